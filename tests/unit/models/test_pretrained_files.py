"""Weights of samunet_pretrain as files: what they say of themselves, and where their decoder comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.pretraining import Pretrained, SeenDataset, read_pretrained, write_pretrained
from samunet.artifacts.subset import Subset
from samunet.core.errors import WeightsError
from samunet.core.files import read_json, sha256_file, write_json
from samunet.core.log import SilentReporter
from samunet.models.loading import load_weights
from samunet.models.sam.network import build_network
from samunet.models.weights import (
    OFFICIAL,
    as_base,
    locate_weights,
    pretrained_weights,
    supplies_decoder,
    weights_kind,
)
from samunet.pipeline.pretrained import labels_read, seen_before, tell_what_was_seen

SPEC = get_spec("vit_t_xs")


def sam_file(folder: Path) -> Path:
    """A whole SAM of a small backbone."""
    torch.manual_seed(0)
    torch.save(build_network(SPEC, image_size=64, num_tokens=4).state_dict(), folder / "sam.pth")
    return folder / "sam.pth"


def described(base: BaseWeights, **changes: object) -> Pretrained:
    seen = SeenDataset(name="Dataset901_Balls", configuration="2d", images={"slices_0": ("a", "b")}, tile_vox=32)
    values: dict[str, object] = {
        "objective": "masked_images",
        "kind": "ssl",
        "backbone": "vit_t_xs",
        "input_size": 64,
        "from_random": base.kind == "none",
        "base": base,
        "datasets": (seen,),
        "steps": 1,
        "minutes": 0.1,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "seed": 0,
    }
    return Pretrained(**values | changes)


def encoder_file(folder: Path, base: BaseWeights, name: str = "weights", **changes: object) -> Path:
    torch.manual_seed(1)
    state = build_network(SPEC, image_size=64, num_tokens=4).state_dict()
    tensors = {key: tensor for key, tensor in state.items() if key.startswith("image_encoder.")}
    write_pretrained(folder / f"{name}.safetensors", tensors, described(base, **changes))
    return folder / f"{name}.safetensors"


def test_a_file_says_what_it_is_wherever_it_lies(tmp_path: Path) -> None:
    """The description is in the file and, with its hash, beside it; other files have none."""
    file = encoder_file(tmp_path, BaseWeights(kind="none"))
    assert read_json(file.with_suffix(".json"))["sha256"] == sha256_file(file)
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    assert read_pretrained(moved) == described(BaseWeights(kind="none"))
    assert weights_kind(str(moved)) == "ssl"
    assert pretrained_weights(str(sam_file(tmp_path))) is None
    assert pretrained_weights("auto") is None
    moved.write_bytes(moved.read_bytes()[:100])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_pretrained(moved)


def test_the_decoder_is_that_of_the_file_it_continued_from(tmp_path: Path) -> None:
    """An encoder that continued SAM gets SAM's decoder, also at second hand; nothing is missing then."""
    base = as_base(locate_weights(f"sam:{sam_file(tmp_path)}", SPEC))
    first = encoder_file(tmp_path, base)
    located = locate_weights(str(first), SPEC, offline=True)
    assert located is not None
    assert located.rest is not None
    assert located.rest.sha256 == base.sha256
    network = build_network(SPEC, image_size=64, num_tokens=4)
    report = load_weights(network, located, keep_heads=True)
    assert (report.missing, report.unexpected) == ((), ())
    decoder = torch.load(tmp_path / "sam.pth")["mask_decoder.iou_token.weight"]
    assert torch.equal(network.state_dict()["mask_decoder.iou_token.weight"], decoder)
    second = encoder_file(tmp_path, as_base(located), name="second")
    again = locate_weights(str(second), SPEC, offline=True)
    assert again is not None
    assert again.rest is not None
    assert again.rest.sha256 == base.sha256
    (tmp_path / "sam.pth").unlink()
    with pytest.raises(WeightsError, match="not here"):
        locate_weights(str(second), SPEC, offline=True)


def test_an_encoder_that_began_as_random_has_no_decoder(tmp_path: Path) -> None:
    """Its encoder loads whole; what is missing is decoder and prompt encoder, and is reported."""
    located = locate_weights(str(encoder_file(tmp_path, BaseWeights(kind="none"))), SPEC, offline=True)
    assert located is not None
    assert located.rest is None
    report = load_weights(build_network(SPEC, image_size=64, num_tokens=4), located)
    assert report.missing
    assert not [key for key in report.missing if key.startswith("image_encoder.")]


def test_training_says_which_validation_cases_taught_its_weights(tmp_path: Path) -> None:
    """Labels of a validation case are a warning, also at second hand; images alone are only mentioned."""
    seen = SeenDataset(
        name="Dataset901_Balls",
        configuration="2d",
        images={"slices_0": ("a", "b"), "unlabelled_0": ("c",)},
        labels_read=True,
        tile_vox=32,
    )
    taught = encoder_file(tmp_path, BaseWeights(kind="none"), name="taught", datasets=(seen,))
    later = encoder_file(tmp_path, as_base(locate_weights(str(taught), SPEC)), name="later")
    told = SilentReporter()
    tell_what_was_seen(as_base(locate_weights(str(later), SPEC)), "Dataset901_Balls", {"b", "c"}, told)
    assert len(told.warnings) == len(told.messages) == 1
    assert "labels of 1 of the 2 validation cases" in told.warnings[0]
    for dataset, cases, messages in (
        ("Dataset901_Balls", {"c"}, ["the images, not the labels, of 1 of the 1"]),
        ("Dataset901_Balls", {"d"}, []),
        ("Dataset902_Others", {"a"}, []),
    ):
        other = SilentReporter()
        tell_what_was_seen(as_base(locate_weights(str(later), SPEC)), dataset, cases, other)
        assert not other.warnings
        assert [part in said for part, said in zip(messages, other.messages, strict=True)] == [True] * len(messages)


def test_files_without_a_record_are_not_known_and_sams_own_saw_no_case(tmp_path: Path) -> None:
    """Whatever their format; a record beside counts only for the file that it names the hash of."""
    official = BaseWeights(kind="sam", file="sam_vit_b_01ec64.pth", sha256=OFFICIAL["vit_b"].sha256)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(encoder_file(tmp_path, BaseWeights(kind="none"))), bare)
    published = BaseWeights(kind="ssl", file=str(bare), sha256=sha256_file(bare), rest=official)
    given = BaseWeights(kind="sam", file=str(sam_file(tmp_path)), sha256=sha256_file(tmp_path / "sam.pth"))
    continued = as_base(locate_weights(str(encoder_file(tmp_path, given, name="later")), SPEC))
    for base, file in ((BaseWeights(kind="none"), None), (official, None), (published, bare), (given, given.file)):
        told = SilentReporter()
        tell_what_was_seen(base, "Dataset901_Balls", {"a"}, told)
        assert ["not known which cases" in text and str(file) in text for text in told.warnings] == [True] * bool(file)
    assert seen_before(continued).unrecorded == (given.file,)
    own = encoder_file(tmp_path, official)
    assert not seen_before(BaseWeights(kind="ssl", file=str(own), sha256=sha256_file(own))).unrecorded
    write_json(tmp_path / "sam.json", {"sha256": "0" * 64, "seen": {}})
    assert seen_before(given).unrecorded == (given.file,)


def test_whether_a_decoder_comes_with_the_weights(tmp_path: Path) -> None:
    """Of a whole SAM, of what continued from one, and of what was taught with prompts, at second hand too."""
    sam = sam_file(tmp_path)
    assert supplies_decoder("auto", "vit_b")
    assert supplies_decoder(f"sam:{sam}", "vit_t_xs")
    random = encoder_file(tmp_path, BaseWeights(kind="none"), name="random")
    assert not supplies_decoder(str(random), "vit_t_xs")
    assert not supplies_decoder(f"ssl:{random}", "vit_t_xs")
    later = encoder_file(tmp_path, as_base(locate_weights(str(random), SPEC)), name="later")
    assert not supplies_decoder(str(later), "vit_t_xs")
    continued = encoder_file(tmp_path, as_base(locate_weights(f"sam:{sam}", SPEC)), name="continued")
    assert supplies_decoder(str(continued), "vit_t_xs")
    prompted = encoder_file(tmp_path, BaseWeights(kind="none"), name="prompted", objective="supervised", kind="sam")
    assert supplies_decoder(str(prompted), "vit_t_xs")
    base = BaseWeights(kind="sam", file=str(prompted), sha256=sha256_file(prompted))
    assert supplies_decoder(str(encoder_file(tmp_path, base, name="after")), "vit_t_xs")
    bare = tmp_path / "bare.pth"
    state = build_network(SPEC, image_size=64, num_tokens=4).state_dict()
    torch.save({key: tensor for key, tensor in state.items() if key.startswith("image_encoder.")}, bare)
    assert not supplies_decoder(f"ssl:{bare}", "vit_t_xs")


def test_labels_from_outside_of_a_subset_are_told(tmp_path: Path) -> None:
    """Weights that read a third case's labels are no start for two labelled cases; those of the two are."""
    seen = SeenDataset(
        name="Dataset901_Balls", configuration="2d", images={"slices_0": ("a", "b", "v")}, labels_read=True, tile_vox=32
    )
    taught = encoder_file(tmp_path, BaseWeights(kind="none"), datasets=(seen,))
    base = as_base(locate_weights(str(taught), SPEC))
    assert labels_read(base, "Dataset901_Balls") == {"a", "b", "v"}
    assert labels_read(BaseWeights(kind="sam", file="gone.pth", rest=base), "Dataset901_Balls") == {"a", "b", "v"}
    assert labels_read(base, "Dataset902_Others") == set()
    for cases, number in ((("a", "b", "v"), 0), (("a", "b"), 1), (("a", "c"), 2)):
        reporter = SilentReporter()
        tell_what_was_seen(base, "Dataset901_Balls", {"w"}, reporter, subset=Subset(cases=cases))
        assert len(reporter.warnings) == (number > 0)
        assert all(f"labels of {number} cases outside of the {len(cases)} chosen" in text for text in reporter.warnings)
    reporter = SilentReporter()
    tell_what_was_seen(base, "Dataset901_Balls", {"w"}, reporter)
    assert not reporter.warnings
