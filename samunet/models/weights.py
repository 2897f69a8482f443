"""Where pretrained weights are: the official files with their hashes, the cache, and files given by path."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.model_spec import SamSpec
from samunet.artifacts.plan import WEIGHTS_KINDS
from samunet.artifacts.pretraining import Pretrained, read_pretrained
from samunet.core.errors import UsageError, WeightsError
from samunet.core.files import atomic_path, sha256_file
from samunet.core.log import Reporter, SilentReporter
from samunet.models.formats import read_published

AUTO, NONE = "auto", "none"
FILE_KINDS = tuple(kind for kind in WEIGHTS_KINDS if kind != NONE)
CACHE_VARIABLE = "SAMUNET_CACHE"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0

Opener = Callable[..., Any]


@dataclass(frozen=True)
class OfficialFile:
    """A published checkpoint.

    Args:
        url: Where it is.
        sha256: Its full hash. (The digits in the official names are the beginning of an MD5.)
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """File name."""
        return self.url.rsplit("/", 1)[-1]


_BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL: Mapping[str, OfficialFile] = {
    "vit_b": OfficialFile(
        _BASE_URL + "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": OfficialFile(
        _BASE_URL + "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": OfficialFile(
        _BASE_URL + "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights.

    Args:
        path: Where it lies.
        sha256: Its full hash.
        kind: "sam", "medsam", "mobile_sam" or "ssl"; it decides the intensity map.
        rest: For an encoder-only file the one that supplies the decoder and the prompt encoder, if there is one.
    """

    path: Path
    sha256: str
    kind: str
    rest: WeightsFile | None = None


def cache_folder() -> Path:
    """Folder of downloaded weights: ``SAMUNET_CACHE``, or ``~/.cache/samunet``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "samunet")


def weights_kind(option: str) -> str:
    """The kind of weights that ``--weights`` asks for, which selects the recipe.

    Args:
        option: "none", "auto" (SAM's official file), ``KIND:PATH``, or a path whose names tell the kind.

    Raises:
        WeightsError: If the file is missing or holds no SAM.
    """
    if option == NONE:
        return NONE
    if option == AUTO:
        return "sam"
    kind, path = _split(option)
    about = None if kind else read_pretrained(path)
    return kind or (about.kind if about else read_published(path).kind)


def pretrained_weights(option: str) -> Pretrained | None:
    """What samunet_pretrain says of a file that ``--weights`` names; None for all other weights.

    Raises:
        WeightsError: If the file is missing or damaged.
    """
    return None if option in (NONE, AUTO) else read_pretrained(_split(option)[1])


def supplies_decoder(option: str, backbone: str) -> bool:
    """Whether training from ``--weights`` finds a mask decoder: in the file, or in the one it continued from.

    Args:
        option: As for :func:`weights_kind`.
        backbone: Of the recipe.

    Raises:
        WeightsError: If the file is missing or damaged.
    """
    if option in (NONE, AUTO):
        return option == AUTO
    path = _split(option)[1]
    about = read_pretrained(path)
    if about is None:
        return backbone in OFFICIAL or not read_published(path).encoder_only
    return about.objective == "supervised" or _had_decoder(about.base)


def _had_decoder(base: BaseWeights) -> bool:
    """Whether weights, or those they continued from, held a decoder, as far as the files are here."""
    if base.kind == NONE or base.rest is not None:
        return base.rest is not None
    path = Path(base.file)
    about = read_pretrained(path) if path.is_file() else None
    if about is None:
        return base.kind != "ssl"
    return about.objective == "supervised" or _had_decoder(about.base)


def locate_weights(
    option: str,
    spec: SamSpec,
    *,
    cache: Path | None = None,
    offline: bool = False,
    official: Mapping[str, OfficialFile] = OFFICIAL,
    opener: Opener = urllib.request.urlopen,
    reporter: Reporter | None = None,
) -> WeightsFile | None:
    """Find, download and verify pretrained weights.

    Args:
        option: As for :func:`weights_kind`.
        spec: The backbone they are for.
        cache: Folder of downloads.
        offline: Look in the cache only.
        official: Official file per backbone.
        opener: Opens a URL, as ``urllib.request.urlopen`` does.
        reporter: Shows the download.

    Returns:
        None for "none".

    Raises:
        WeightsError: If they cannot be had or are not what they should be; the message says which file to put where.
    """
    if option == NONE:
        return None

    def fetch_official() -> WeightsFile:
        return _official(spec, cache or cache_folder(), offline, official, opener, reporter or SilentReporter())

    if option == AUTO:
        return fetch_official()
    explicit, path = _split(option)
    about = read_pretrained(path)
    if about is not None and about.backbone != spec.name:
        raise WeightsError(
            "the weights were pretrained for another backbone",
            expected=spec.name,
            found=about.backbone,
            file=path,
            todo=f"--backbone {about.backbone}, or leave it out",
        )
    published = read_published(path)
    kind = about.kind if about else published.kind if published.kind in spec.pretrained else "ssl"
    kind = explicit or kind
    if kind not in spec.pretrained:
        raise WeightsError(
            f"there are no weights of kind {kind} for {spec.name}",
            expected=f"one of {', '.join(spec.pretrained)}",
            found=kind,
            file=path,
        )
    rest = None
    if published.encoder_only and about is not None:
        rest = _decoder_of(about.base, fetch_official if spec.name in official else None)
    elif published.encoder_only and spec.name in official:
        rest = fetch_official()
    return WeightsFile(path.resolve(), sha256_file(path), kind, rest)


def recorded_weights(base: BaseWeights) -> WeightsFile | None:
    """Weights that were used before, where they were or in the cache; None for random weights.

    Raises:
        WeightsError: If they are in neither place with the same hash.
    """
    if base.kind == NONE:
        return None
    recorded = Path(base.file)
    for path in (recorded, cache_folder() / recorded.name):
        if path.is_file() and sha256_file(path) == base.sha256:
            rest = None if base.rest is None else recorded_weights(base.rest)
            return WeightsFile(path, base.sha256, base.kind, rest)
    raise WeightsError(
        "the pretrained weights this model was adapted from are not here",
        expected=f"{recorded.name} with SHA-256 {base.sha256}",
        file=recorded,
        todo=f"put that file into {cache_folder()}",
    )


def as_base(file: WeightsFile | None) -> BaseWeights:
    """Weights as checkpoints record them."""
    if file is None:
        return BaseWeights(kind=NONE)
    rest = None if file.rest is None else as_base(file.rest)
    return BaseWeights(kind=file.kind, file=str(file.path), sha256=file.sha256, rest=rest)


def _decoder_of(base: BaseWeights, fetch: Callable[[], WeightsFile] | None) -> WeightsFile | None:
    """The file that supplies the decoder of an encoder that continued from a base; None where that was random."""
    if base.rest is not None:
        return _decoder_of(base.rest, fetch)
    try:
        found = recorded_weights(base)
    except WeightsError:
        if fetch is None or (official := fetch()).sha256 != base.sha256:
            raise
        return official
    return None if found is None or read_published(found.path).encoder_only else found


def _split(option: str) -> tuple[str | None, Path]:
    """The kind, where the option is ``KIND:PATH``, and the path."""
    prefix, separator, rest = option.partition(":")
    explicit = prefix if separator and prefix in FILE_KINDS else None
    path = Path(rest if explicit else option).expanduser()
    if not path.is_file():
        raise WeightsError(
            "the weights do not exist",
            expected=f"auto, none, a file, or KIND:FILE with KIND one of {', '.join(FILE_KINDS)}",
            found=option,
        )
    return explicit, path


def _official(
    spec: SamSpec,
    cache: Path,
    offline: bool,
    official: Mapping[str, OfficialFile],
    opener: Opener,
    reporter: Reporter,
) -> WeightsFile:
    if spec.name not in official:
        raise UsageError(
            f"there is no official file for {spec.name}",
            expected=f"a backbone among {', '.join(official)}, or --weights with a path or none",
            found=AUTO,
        )
    wanted = official[spec.name]
    target = cache / wanted.name
    if not target.is_file():
        if offline:
            raise _unavailable(wanted, target, "working offline, and the file is not in the cache")
        _download(wanted, target, opener, reporter)
    found = sha256_file(target)
    if found != wanted.sha256:
        raise WeightsError(
            "the cached weights are damaged or not the official ones",
            expected=f"SHA-256 {wanted.sha256}",
            found=found,
            file=target,
            todo=f"delete the file and run again, or put the file of {wanted.url} in its place",
        )
    return WeightsFile(target, found, "sam")


def _download(wanted: OfficialFile, target: Path, opener: Opener, reporter: Reporter) -> None:
    """Write the file only if it arrived whole; a broken download leaves nothing behind."""
    try:
        with opener(wanted.url, timeout=TIMEOUT_S) as response, atomic_path(target) as temporary:
            length = int(response.headers.get("Content-Length") or 0)
            digest, received = hashlib.sha256(), 0
            chunks = reporter.track(_chunks(response), total=-(-length // CHUNK_BYTES), what=f"download {wanted.name}")
            with temporary.open("wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
            if received < length:
                raise _unavailable(wanted, target, f"the connection ended after {received} of {length} bytes")
            if digest.hexdigest() != wanted.sha256:
                raise WeightsError(
                    "the downloaded weights are not the official ones, and were deleted",
                    expected=f"SHA-256 {wanted.sha256}",
                    found=digest.hexdigest(),
                    file=target,
                    todo=f"download {wanted.url} by other means and put it there, or train with --weights none",
                )
    except (OSError, http.client.HTTPException) as error:
        raise _unavailable(wanted, target, str(error)) from error


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read(CHUNK_BYTES):
        yield chunk


def _unavailable(wanted: OfficialFile, target: Path, why: str) -> WeightsError:
    return WeightsError(
        f"the pretrained weights {wanted.name} could not be had",
        expected=f"the file of {wanted.url}",
        found=why,
        file=target,
        todo=f"put that file into {target.parent}, or give its path to --weights; "
        "--weights none trains from random weights",
    )
