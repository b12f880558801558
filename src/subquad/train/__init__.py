"""Training a model on a task, so that it can be killed at any moment and started again."""

from subquad.train.config import TrainConfig
from subquad.train.forward import evaluate
from subquad.train.loop import TrainResult, export, train
from subquad.train.run import NonFiniteLoss

__all__ = ["NonFiniteLoss", "TrainConfig", "TrainResult", "evaluate", "export", "train"]
