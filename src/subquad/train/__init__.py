"""Training a model on a task, so that it can be killed at any moment and started again."""

from subquad.train.config import TrainConfig
from subquad.train.forward import evaluate
from subquad.train.loop import TrainResult, train
from subquad.train.run import NonFiniteLoss

__all__ = ["NonFiniteLoss", "TrainConfig", "TrainResult", "evaluate", "train"]
