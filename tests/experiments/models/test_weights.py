"""What a model of timm begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ritornello.experiments.models.weights import begin_with, normalisation_of, tensors_in

NAME = "test_efficientnet"

State = dict[str, Tensor]


def model(num_classes: int = 7) -> nn.Module:
    made: nn.Module = timm.create_model(NAME, num_classes=num_classes)
    return made


@pytest.fixture(scope="module")
def trained() -> State:
    """The weights of another model of 1,000 classes, none of them as they are made."""
    torch.manual_seed(3)
    return {
        name: torch.rand_like(each) if each.is_floating_point() else each + 5
        for name, each in model(1000).state_dict().items()
    }


def check_begun(begun: nn.Module, state: State, but: str = "classifier") -> None:
    own = begun.state_dict()
    for name, tensor in state.items():
        if not name.startswith(but):
            assert torch.equal(own[name], tensor), name


def foreign(state: State) -> State:
    return {f"_layers.{number}": tensor for number, tensor in enumerate(state.values())}


def has_weights(name: str) -> bool:
    config: Any = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.has_weights)


def without_counters(state: State) -> State:
    return {name: each for name, each in state.items() if not name.endswith("tracked")}


FORMS: dict[str, Callable[[State], Any]] = {
    "as-it-is": dict,
    "wrapped": lambda state: {"epoch": 3, "state_dict": state},
    "parallel": lambda state: {f"module.{name}": each for name, each in state.items()},
    "foreign": foreign,
    "half": lambda state: {name: each.half() for name, each in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_found_by_their_names_or_by_their_order(
    form: str, trained: State, tmp_path: Path
) -> None:
    torch.save(FORMS[form](trained), tmp_path / "file.pth")
    begun = model()
    last = begun.state_dict()["classifier.weight"].clone()

    begin_with(begun, NAME, tmp_path / "file.pth")

    expected = {name: each.half() for name, each in trained.items()} if form == "half" else trained
    own = {name: each.to(expected[name].dtype) for name, each in begun.state_dict().items()}
    for name, tensor in expected.items():
        if not name.startswith("classifier") and not name.endswith("tracked"):
            assert torch.equal(own[name], tensor), name
    assert torch.equal(begun.state_dict()["classifier.weight"], last), "it has another size"


def test_safetensors_and_files_without_counters(trained: State, tmp_path: Path) -> None:
    some = without_counters(trained)
    save_file(some, tmp_path / "file.safetensors")
    torch.save(foreign(some), tmp_path / "file.bin")
    for name in ("file.safetensors", "file.bin"):
        begun = model(1000)
        begin_with(begun, NAME, tmp_path / name)
        check_begun(begun, some, but="nothing")  # also the last layer, of the same size


def test_what_timm_downloads(trained: State, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    begun, made = model(), model(1000)
    made.load_state_dict(trained)

    def create_model(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        asked.append(name)
        return made

    monkeypatch.setattr(timm, "create_model", create_model)
    begin_with(begun, NAME, "timm")
    check_begun(begun, trained)
    assert asked == [NAME]


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool) -> nn.Module:
        raise OSError("no route to host")

    begun = model()
    monkeypatch.setattr(timm, "create_model", create_model)
    message = "could not download them .no route to host.. Get them elsewhere, and give the file"
    with pytest.raises(ConnectionError, match=message):
        begin_with(begun, NAME, "timm")


def test_a_model_for_which_timm_has_none() -> None:
    candidates = ("regnetz_005", "mnasnet_050", "efficientnet_b8")
    name = next(each for each in candidates if not has_weights(each))
    with pytest.raises(ValueError, match=f"model='{name}': timm has no weights for it"):
        begin_with(model(), name, "timm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it holds no tensors by their names"),
        ([torch.zeros(2)], "it holds no tensors by their names"),
        ({"a": 3}, "'a' is no tensor"),
        ({0: torch.zeros(2)}, "0 is no name of a tensor"),
        (b"nonsense", "it cannot be read"),
    ],
)
def test_files_that_hold_something_else(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        tensors_in(path)


def test_weights_that_are_not_finite(trained: State, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(trained | {"bn1.bias": trained["bn1.bias"] * float("nan")}, path)
    message = f"file.pth' with model='{NAME}': the file's tensor for bn1.bias has values that are"
    with pytest.raises(ValueError, match=message):
        begin_with(model(), NAME, path)


def test_no_file_and_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        tensors_in(tmp_path / "file.pth")
    with pytest.raises(ValueError, match="a file of weights ends with .safetensors, .pth"):
        tensors_in(tmp_path / "file.npz")


def test_the_weights_of_another_model(trained: State, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    wide = trained | {"conv_stem.weight": torch.zeros(24, 1, 3, 3)}
    torch.save(wide, path)
    message = r"conv_stem.weight has the shape \[24, 1, 3, 3\], and the model's \[24, 3, 3, 3\]"
    with pytest.raises(ValueError, match=message):
        begin_with(model(), NAME, path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="has no conv_stem.weight, .*: it holds 1 tensors, the"):
        begin_with(model(), NAME, path)
    wrong = list(foreign(trained).values())
    torch.save({str(number): each for number, each in enumerate(reversed(wrong))}, path)
    with pytest.raises(ValueError, match="has no conv_stem.weight, nor the model's tensors under"):
        begin_with(model(), NAME, path)


def test_pixels_are_normalised_as_the_model_was_trained() -> None:
    assert normalisation_of("resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation_of("tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="weights with model='mlp': only models of timm"):
        normalisation_of("mlp")
