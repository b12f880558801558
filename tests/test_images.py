"""The task of images: digits, folders and files, a split that holds, errors that name the cause."""

import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from subquad.tasks import EVAL_SEEDS, create_task
from subquad.tasks.pictures import Folder


@pytest.fixture(scope="module")
def digits():
    return create_task("images", size=16)


@pytest.fixture
def folder(tmp_path):
    """Two classes of twelve pictures: the reds are wide, the blues tall, edges of another color."""
    from PIL import Image

    for name, shape, color in (("red", (6, 10), (255, 0, 0)), ("blue", (10, 6), (0, 0, 255))):
        (tmp_path / name).mkdir()
        pixels = np.full((*shape, 3), 128, np.uint8)
        pixels[(shape[0] - 6) // 2 :, (shape[1] - 6) // 2 :][:6, :6] = color
        for i in range(12):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def keys(batch) -> set[bytes]:
    return {image.numpy().tobytes() for image in batch.inputs}


def test_digits_are_scaled_and_labelled(digits):
    batch = digits.batch(9, 0)
    assert batch.inputs.shape == (9, 1, 16, 16)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.min() == -1
    assert 0.5 < batch.inputs.max() <= 1
    assert batch.labels.shape == (9,)
    assert digits.vocab_size == 10
    assert digits.classes == tuple("0123456789")
    assert digits.counts == (1437, 360)
    plain = create_task("images", size=8).batch(9, EVAL_SEEDS).inputs
    assert torch.equal(((plain + 1) * 8).round(), (plain + 1) * 8)  # the 17 greys of the original
    assert create_task("images", size=8, channels=3).batch(2, 0).inputs.shape == (2, 3, 8, 8)


def test_same_seed_same_data(digits):
    again = create_task("images", size=16)
    for seed in (3, EVAL_SEEDS + 1):
        a, b = digits.batch(5, seed), again.batch(5, seed)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
    assert keys(digits.batch(5, 3)) != keys(digits.batch(5, 4))


def test_training_never_sees_what_is_held_out(digits):
    held = [digits.batch(60, EVAL_SEEDS + i) for i in range(6)]
    seen = set().union(*map(keys, held))
    assert len(seen) >= 359  # six batches are one pass over all (a digit may be drawn twice alike)
    assert not keys(digits.batch(1437, 0)) & seen
    other = create_task("images", size=16, split_seed=1).batch(360, EVAL_SEEDS)
    assert keys(other) != seen


def test_a_shift_moves_training_images_only():
    still = create_task("images", size=16, split_seed=2)
    moved = create_task("images", size=16, split_seed=2, shift=3)
    assert torch.equal(still.batch(7, EVAL_SEEDS).inputs, moved.batch(7, EVAL_SEEDS).inputs)
    drawn = moved.batch(40, 0).inputs
    assert drawn.shape == (40, 1, 16, 16)
    empty = (drawn == -1).all(2).float().mean()
    assert empty > (still.batch(40, 0).inputs == -1).all(2).float().mean()


def test_scores(digits):
    batch = digits.batch(20, 0)
    sure = 20 * torch.nn.functional.one_hot(batch.labels, 10).float()
    assert digits.score(sure, batch)["accuracy"] == 1
    assert digits.score(sure, batch)["loss"] < 1e-3
    assert digits.score(sure.roll(1, 1), batch)["accuracy"] == 0
    with pytest.raises(ValueError, match=r"logits must be \[n,classes\]=\[20, 10\], got \[20, 9\]"):
        digits.score(sure[:, 1:], batch)


def test_a_folder_a_class(folder, tmp_path_factory):
    task = create_task("images", path=folder, size=4, channels=3, held_out=0.25)
    assert task.classes == ("blue", "red")
    assert task.counts == (18, 6)
    batch = task.batch(18, 0)
    for image, label in zip(batch.inputs, batch.labels):
        color = [-1.0, -1.0, 1.0] if label == 0 else [1.0, -1.0, -1.0]
        assert torch.allclose(image, torch.tensor(color)[:, None, None].expand(3, 4, 4), atol=0.02)
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "set")
    again = create_task("images", path=moved, size=4, channels=3, held_out=0.25)
    assert task.options() == again.options()
    assert torch.equal(task.batch(4, 0).inputs, again.batch(4, 0).inputs)
    next(moved.glob("*/*.png")).unlink()
    assert Folder(moved).digest() != Folder(folder).digest()


def test_files_without_folders_are_one_class(folder):
    assert create_task("images", path=folder / "red", size=4).classes == ("red",)


def test_the_digits_from_a_file_are_the_same(digits, tmp_path):
    """Options and batches depend on what the pictures are, not on where they lie."""
    found = digits._pictures
    tensors = {"images": found.images.contiguous(), "labels": found.labels}
    save_file(tensors, tmp_path / "digits.safetensors")
    again = create_task("images", path=tmp_path / "digits.safetensors", size=16)
    assert again.options() == digits.options()
    assert torch.equal(again.batch(5, 3).inputs, digits.batch(5, 3).inputs)


def test_a_safetensors_file(tmp_path):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 4, 4) * 25
    save_file(
        {"images": images.contiguous(), "labels": torch.arange(10)}, tmp_path / "a.safetensors"
    )
    batch = create_task("images", path=tmp_path / "a.safetensors", size=8).batch(8, 0)
    assert torch.allclose(batch.inputs[:, 0, 3, 3], batch.labels * 25 / 255 * 2 - 1, atol=1e-5)


BAD = [
    ({"size": 0}, "size must be a positive int, got 0"),
    ({"channels": 2}, "channels must be one of [1, 3], got 2"),
    ({"held_out": 1.0}, "held_out must lie in 0..1"),
    ({"held_out": 0.9999}, "held_out must leave images to train on"),
    ({"shift": -1}, "shift must be a non-negative int, got -1"),
    ({"path": "/no/such/place"}, "path must be a folder of images or a .safetensors file"),
    ({"sizes": 8}, "did you mean 'size'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        create_task("images", **options)
    assert message in str(error.value)


def test_bad_files_are_refused(folder, tmp_path):
    for file in (folder / "red").iterdir():  # all of one class: a batch cannot miss them
        file.write_bytes(b"no png")
    task = create_task("images", path=folder, size=4)
    with pytest.raises(ValueError, match=r"\.png cannot be read as an image"):
        task.batch(60, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="path must hold images"):
        create_task("images", path=tmp_path / "empty")
    save_file({"images": torch.zeros(2, 1, 4, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="path must hold images and labels"):
        create_task("images", path=tmp_path / "b.safetensors")
    tensors = {"images": torch.zeros(2, 2, 4, 4), "labels": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"images must be \[n,1 or 3,H,W\]"):
        create_task("images", path=tmp_path / "c.safetensors")


def test_what_is_missing_is_named(folder):
    gone = mock.patch.dict(sys.modules, {"sklearn.datasets": None, "sklearn": None, "PIL": None})
    with gone, pytest.raises(ImportError, match="scikit-learn"):
        create_task("images")
    with gone, pytest.raises(ImportError, match="Pillow"):
        create_task("images", path=folder)
