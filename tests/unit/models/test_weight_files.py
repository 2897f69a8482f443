"""Finding, downloading and verifying weights, against a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from samunet.artifacts.model_spec import SPECS, get_spec
from samunet.core.errors import UsageError, WeightsError
from samunet.core.files import sha256_file
from samunet.core.log import SilentReporter
from samunet.models.weights import OFFICIAL, OfficialFile, cache_folder, locate_weights, weights_kind
from tests.unit.models.model_helpers import SMALL_TINY, SMALL_VIT, base_file

CONTENT = bytes(range(256)) * 9000
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT whole, or promises more than it sends."""

    def do_GET(self) -> None:
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if "truncated" in self.path else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as instance:
        thread = threading.Thread(target=instance.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()
        thread.join()


def _table(server: str, name: str, sha256: str) -> dict[str, OfficialFile]:
    return {"small_vit": OfficialFile(f"{server}/{name}", sha256)}


def test_pinned_hashes_cover_the_official_backbones() -> None:
    """SAM's three backbones have an official file with a full, distinct hash."""
    assert set(OFFICIAL) == {"vit_b", "vit_l", "vit_h"}
    assert all("sam" in SPECS[name].pretrained for name in OFFICIAL)
    assert len({file.sha256 for file in OFFICIAL.values()}) == 3
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in OFFICIAL.values())
    assert OFFICIAL["vit_b"].name == "sam_vit_b_01ec64.pth"


def test_download_is_verified_and_cached(server: str, tmp_path: Path) -> None:
    """The first call downloads and verifies; the second needs no server."""
    official = _table(server, "whole.pth", hashlib.sha256(CONTENT).hexdigest())
    file = locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, opener=DIRECT)
    assert file is not None
    assert file.path == tmp_path / "whole.pth"
    assert file.path.read_bytes() == CONTENT
    assert (file.kind, file.sha256) == ("sam", hashlib.sha256(CONTENT).hexdigest())
    again = locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, offline=True)
    assert again == file


def test_download_shows_its_progress(server: str, tmp_path: Path) -> None:
    """A reporter sees the chunks go by, with the number it was told."""
    seen: list[tuple[int, str]] = []

    class Counting(SilentReporter):
        def track(self, items, *, total, what):  # type: ignore[no-untyped-def]
            chunks = list(items)
            seen.append((total, what))
            assert len(chunks) == total
            return iter(chunks)

    official = _table(server, "whole.pth", hashlib.sha256(CONTENT).hexdigest())
    locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, opener=DIRECT, reporter=Counting())
    assert seen == [(3, "download whole.pth")]


def test_wrong_hash_is_deleted(server: str, tmp_path: Path) -> None:
    """A file with another hash is refused with both hashes, and nothing stays behind."""
    official = _table(server, "whole.pth", "0" * 64)
    with pytest.raises(WeightsError, match="not the official ones") as caught:
        locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, opener=DIRECT)
    assert caught.value.found == hashlib.sha256(CONTENT).hexdigest()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "why"), [("truncated.pth", "1152000 of 2304000 bytes"), ("missing.pth", "404")])
def test_failed_download_leaves_nothing_and_says_what_to_do(server: str, tmp_path: Path, name: str, why: str) -> None:
    """A broken connection or a missing file names the URL, the folder and --weights none."""
    official = _table(server, name, hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(WeightsError, match=name) as caught:
        locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, opener=DIRECT)
    message = str(caught.value)
    assert why in message
    assert f"{server}/{name}" in message
    assert str(tmp_path) in message
    assert "--weights none" in message
    assert list(tmp_path.iterdir()) == []


def test_offline_says_which_file_to_put_where(tmp_path: Path) -> None:
    """Without a network the message names the official file, the folder and the way out; nothing is opened."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    with pytest.raises(WeightsError, match=r"sam_vit_b_01ec64\.pth") as caught:
        locate_weights("auto", get_spec("vit_b"), cache=tmp_path, offline=True, opener=refuse)
    assert OFFICIAL["vit_b"].url in str(caught.value.expected)
    assert caught.value.file == tmp_path / "sam_vit_b_01ec64.pth"
    assert "--weights none" in str(caught.value.todo)


def test_unreachable_server_is_the_same_message(tmp_path: Path) -> None:
    """A connection that is refused is answered like being offline."""
    official = _table("http://127.0.0.1:9", "whole.pth", "0" * 64)
    with pytest.raises(WeightsError, match="could not be had"):
        locate_weights("auto", SMALL_VIT, cache=tmp_path, official=official, opener=DIRECT)


def test_damaged_cache_is_never_used(tmp_path: Path) -> None:
    """A cached file of another hash stops with the file to delete; it is left for the user to look at."""
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes(b"not it")
    with pytest.raises(WeightsError, match="damaged") as caught:
        locate_weights("auto", get_spec("vit_b"), cache=tmp_path, offline=True)
    assert caught.value.expected == f"SHA-256 {OFFICIAL['vit_b'].sha256}"
    assert (tmp_path / "sam_vit_b_01ec64.pth").exists()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SAMUNET_CACHE moves the cache; without it the user's cache folder is taken."""
    monkeypatch.setenv("SAMUNET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SAMUNET_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "samunet"


def test_none_is_no_file() -> None:
    """Random weights are no file, and are of kind none."""
    assert locate_weights("none", SMALL_VIT) is None
    assert weights_kind("none") == "none"
    assert weights_kind("auto") == "sam"


def test_auto_without_an_official_file_is_a_usage_error() -> None:
    """A backbone that nobody published says which ones have a file."""
    with pytest.raises(UsageError, match="no official file") as caught:
        locate_weights("auto", get_spec("vit_t_xs"), offline=True)
    assert "vit_b" in str(caught.value.expected)


@pytest.mark.parametrize(("name", "kind"), [("sam_x.pth", "sam"), ("medsam_vit_b.pth", "medsam")])
def test_kind_of_a_path_is_read_from_its_names(tmp_path: Path, name: str, kind: str) -> None:
    """MedSAM's keys are SAM's: the file name tells them apart, and KIND:PATH overrules it."""
    file = base_file(tmp_path, SMALL_VIT, image_size=64)
    path = file.path.rename(tmp_path / name)
    assert weights_kind(str(path)) == kind
    assert weights_kind(f"ssl:{path}") == "ssl"
    located = locate_weights(f"sam:{path}", SMALL_VIT)
    assert located is not None
    assert (located.kind, located.sha256, located.rest) == ("sam", sha256_file(path), None)


def test_encoder_only_file_takes_the_decoder_of_the_official_one(server: str, tmp_path: Path) -> None:
    """An encoder-only file is of kind ssl, and where SAM is published for the backbone it supplies the rest."""
    complete = base_file(tmp_path, SMALL_VIT, image_size=64)
    state = torch.load(complete.path, weights_only=True)
    encoder = {k.removeprefix("image_encoder."): t for k, t in state.items() if k.startswith("image_encoder.")}
    path = tmp_path / "encoder.pth"
    torch.save(encoder, path)
    official = _table(server, complete.path.name, complete.sha256)
    assert weights_kind(str(path)) == "ssl"
    located = locate_weights(str(path), SMALL_VIT, cache=tmp_path, official=official, offline=True)
    assert located is not None
    assert located.kind == "ssl"
    assert located.rest is not None
    assert located.rest.path == complete.path
    alone = locate_weights(str(path), SMALL_VIT, official={})
    assert alone is not None
    assert alone.rest is None


def test_weights_of_a_kind_the_backbone_has_not_are_refused(tmp_path: Path) -> None:
    """There is no MedSAM for a TinyViT."""
    file = base_file(tmp_path, SMALL_TINY, image_size=64)
    with pytest.raises(WeightsError, match="no weights of kind medsam") as caught:
        locate_weights(f"medsam:{file.path}", SMALL_TINY)
    assert caught.value.expected == "one of mobile_sam, ssl"
    located = locate_weights(str(file.path), SMALL_TINY)
    assert located is not None
    assert located.kind == "ssl"


def test_a_path_that_does_not_exist_lists_the_choices() -> None:
    """A typing mistake is answered with what --weights takes."""
    with pytest.raises(WeightsError, match="do not exist") as caught:
        weights_kind("atuo")
    assert "auto, none, a file" in str(caught.value.expected)
    assert caught.value.found == "atuo"
