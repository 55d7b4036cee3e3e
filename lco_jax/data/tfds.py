"""TFDS datasets as records: NLI as triplets; images, audio or video with captions.

Needs no TensorFlow: a dataset must be prepared as array_record (TFDS's `data_source`).
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.captions import Caption, captioned
from lco_jax.data.records import Record, parse_record
from lco_jax.data.scan import ListSource, Scan, Source

NLI = {"premise", "hypothesis", "label"}
PIXELS = {"image": ("uint8", "uint16"), "video": ("uint8",)}  # the types that decoders take


class _Dataset:
    """A split of a prepared dataset. features: by name; TFDS reads them in any order."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        import tensorflow_datasets as tfds

        self.split = split
        self.unread = f"the TFDS dataset {name!r} ({split}, data_dir {data_dir}) cannot be read"
        if data_dir is not None:
            folder = Path(data_dir) / name.split(":")[0]
            if not folder.is_dir():
                raise LcoError(f"{self.unread}: there is no folder {folder}")
        # TFDS raises many kinds of errors for a dataset that is not there in this form
        with explained(self.unread, Exception), _without_tensorflow():
            self.builder = tfds.builder(name, data_dir=data_dir)
            features = self.builder.info.features
        self.features = dict(sorted(features.items()))

    @property
    def version(self) -> str:
        """Text that differs for another version, or when the files have other sizes."""
        digest = blake2b(digest_size=8)
        for file in sorted(Path(self.builder.data_path).iterdir()):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        return f"{self.builder.info.full_name}, files with digest {digest.hexdigest()}"

    def rows(self, decoders: Mapping[str, Any] | None = None) -> Any:
        """Rows by index."""
        with explained(self.unread, Exception), _without_tensorflow():
            return self.builder.as_data_source(split=self.split, decoders=decoders)


@contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Within, TFDS builds its features of audio and video with numpy's dtypes.

    They want TensorFlow only for `as_dtype`.
    """
    import tensorflow_datasets as tfds

    features = (tfds.features.Audio, tfds.features.Video)
    modules = [sys.modules[feature.__module__] for feature in features]
    before = [module.tf for module in modules]
    for module in modules:
        module.tf = SimpleNamespace(dtypes=SimpleNamespace(as_dtype=np.dtype), string=np.object_)
    try:
        yield
    finally:
        for module, tf in zip(modules, before, strict=True):
            module.tf = tf


def nli_source(
    name: str, split: str = "train", data_dir: str | None = None, on_bad: str = "error"
) -> ListSource:
    """A dataset with `premise`, `hypothesis` and `label` as triplets.

    The premise is the anchor, an entailed hypothesis the positive, a contradicted one the negative.
    A premise that has both gives one triplet for each entailed hypothesis, and takes its
    contradictions in turn.
    """
    dataset = _Dataset(name, split, data_dir)
    labels = _nli_labels(dataset.features, f"the TFDS dataset {name!r}")
    scan = Scan(on_bad)
    for premise, by_label in _hypotheses(dataset.rows(), labels).items():
        where = f"tfds:{name}/{split}, premise {premise!r:.40}"
        for triplet in _triplets(premise, by_label):
            scan.check(parse_record, triplet, where)
    if not scan.kept and not scan.skipped:
        lacks = "has no premise with an entailment and a contradiction"
        raise LcoError(f"the TFDS dataset {name!r} ({split}) {lacks}")
    scan.finish(name)
    return ListSource(scan.kept, scan.skipped, scan.digests)


def _nli_labels(features: Mapping[str, Any], dataset: str) -> list[str]:
    missing = sorted(NLI - features.keys())
    if missing:
        there = ", ".join(features)
        tip = "for images, audio or video give a caption, such as 'a {label}'"
        lacks = f"has no feature {missing[0]!r}, which NLI needs"
        raise LcoError(f"{dataset} {lacks}; its features: {there}; {tip}")
    names = getattr(features["label"], "names", None)
    if not names:
        raise LcoError(f"{dataset} has a label without names; it needs a ClassLabel")
    return names


def _hypotheses(
    rows: Iterable[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Premise -> label -> hypotheses."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["label"] >= 0:  # -1: the annotators did not agree
            premise = row["premise"].decode()
            hypothesis = row["hypothesis"].decode()
            label = labels[row["label"]]
            found[premise][label].append(hypothesis)
    return found


def _triplets(premise: str, by_label: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    entailed, contradicted = by_label["entailment"], by_label["contradiction"]
    if contradicted:
        for positive, negative in zip(entailed, cycle(contradicted), strict=False):
            yield {"anchor": premise, "positive": positive, "negative": negative}


class CaptionedSource(Source):
    """A dataset of images, audio or videos, each with a caption.

    Rows are read on demand; opening the source reads only the first.

    caption: a template over the other features. A class label is its name, with spaces for
    underscores. values: for some features, what to write in place of each value.
    feature: the feature of media to take, where there are several. reverse: the caption is the
    anchor. sampling_rate: of audio, in Hz, where the dataset lacks it. fps: of video.

    An image stays as it is stored, encoded. Audio is float32 [T] in [-1, 1], video uint8
    [T, H, W, C].
    """

    def __init__(
        self,
        name: str,
        caption: str,
        split: str = "train",
        data_dir: str | None = None,
        feature: str | None = None,
        values: Mapping[str, Mapping] | None = None,
        reverse: bool = False,
        sampling_rate: int | None = None,
        fps: float | None = None,
        on_bad: str = "error",
    ):
        Scan(on_bad)  # checks the word; no row is scanned
        self.name, self.where = f"the TFDS dataset {name!r}", f"tfds:{name}/{split}"
        self.reverse = reverse
        dataset = _Dataset(name, split, data_dir)
        features = dataset.features
        kinds = _media_kinds(features)
        self.feature = self._choose(feature, kinds, features)
        self.kind = kinds[self.feature]
        self.modalities = Source.modalities | {self.kind}
        self.rate = self._rate(features[self.feature], sampling_rate, fps)
        self.rows = dataset.rows(_images_as_stored(kinds))
        fields = {key: features[key] for key in features if key not in kinds}
        self.caption = Caption(caption, list(fields), values, self.name)
        self.labels = _label_names(fields)
        self._check_first(split)
        self.version = f"{len(self.rows):,} rows of {dataset.version}"

    def _check_first(self, split: str) -> None:
        """Raise if there is no row, or if the first has no caption."""
        if not len(self.rows):
            raise LcoError(f"{self.name} ({split}) is empty")
        self[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.where}, row {index}"
        unread = f"{where} cannot be read"
        with explained(unread, Exception):  # TFDS, protobuf and decoders raise many kinds
            row = self.rows[index]
        for key in (self.feature, *self.caption.fields):
            if row[key] is None:
                raise LcoError(f"{unread}: it has no {key}")
        with explained(unread, UnicodeDecodeError):
            fields = {key: _plain(row[key]) for key in self.caption.fields}
        for key in fields.keys() & self.labels.keys():
            fields[key] = self._label(key, fields[key], where)
        caption = self.caption(fields, where)
        medium = self._medium(row[self.feature])
        return captioned(self.kind, medium, caption, self.reverse, where)

    def _label(self, key: str, label: int, where: str) -> str:
        if label < 0:
            raise LcoError(f"{where} has no {key} ({label}); choose a split whose rows have one")
        return self.labels[key][label].replace("_", " ")

    def _medium(self, value: Any) -> Any:
        if self.kind == "video":
            return {"array": np.asarray(value), **self.rate}
        if self.kind == "image" or isinstance(value, bytes):  # audio may be stored as its file, too
            return value
        return {"array": _waveform(value), **self.rate}

    def _choose(
        self, feature: str | None, kinds: Mapping[str, str], features: Iterable[str]
    ) -> str:
        if not kinds:
            lacks = "has no feature of images, audio or video"
            raise LcoError(f"{self.name} {lacks}; its features: {', '.join(features)}")
        if feature is None and len(kinds) == 1:
            return next(iter(kinds))
        if feature not in kinds:
            media = ", ".join(kinds)
            raise LcoError(f"{self.name}: feature is {feature!r}; it must be one of: {media}")
        return feature

    def _rate(self, feature: Any, sampling_rate: int | None, fps: float | None) -> dict[str, float]:
        """The rate that belongs to an array. Raises for a type that decoders do not take."""
        self._check_rate("sampling_rate", sampling_rate, "audio")
        self._check_rate("fps", fps, "video")
        if self.kind == "audio":
            rate = sampling_rate or feature.sample_rate
            if not rate:
                lacks = f"does not give the sampling rate of {self.feature!r}"
                raise LcoError(f"{self.name} {lacks}; give sampling_rate, in Hz")
            return {"sampling_rate": rate}
        pictures = feature if self.kind == "image" else feature.feature
        dtype = np.dtype(pictures.np_dtype)
        if dtype.name not in PIXELS[self.kind]:
            taken = ", ".join(PIXELS[self.kind])
            raise LcoError(
                f"{self.name}: {self.feature!r} holds {dtype} pixels, and they must be {taken}"
            )
        return {} if fps is None else {"fps": fps}

    def _check_rate(self, key: str, value: Any, kind: str) -> None:
        if value is None:
            return
        if kind != self.kind:
            raise LcoError(f"{self.name}: {key} is for {kind}, and {self.feature!r} is {self.kind}")
        if not isinstance(value, int | float) or value <= 0:
            raise LcoError(f"{self.name}: {key} is {value!r}; it must be a number above 0")


def _media_kinds(features: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each feature that holds media."""
    import tensorflow_datasets as tfds

    classes = {
        "image": tfds.features.Image,
        "audio": tfds.features.Audio,
        "video": tfds.features.Video,
    }
    return {
        name: kind
        for name, feature in features.items()
        for kind, cls in classes.items()
        if isinstance(feature, cls)
    }


def _images_as_stored(kinds: Mapping[str, str]) -> dict[str, Any]:
    """TFDS's decoders that leave images encoded. kinds: those of the features of media.

    We decode all images in one way. TFDS's way depends on what is installed, and takes palettes
    for greys.
    """
    import tensorflow_datasets as tfds

    return {name: tfds.decode.SkipDecoding() for name, kind in kinds.items() if kind == "image"}


def _label_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each feature that is a label."""
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel
    return {name: one.names for name, one in features.items() if isinstance(one, label)}


def _plain(value: Any) -> Any:
    """A row's value as strings, numbers, lists and dicts."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, np.ndarray | list) else value


def _waveform(value: Any) -> np.ndarray:
    """Samples [T] or [T, channels] -> mono float32 [T] in [-1, 1].

    TFDS has PCM as integers, int64 by default.
    """
    samples = np.asarray(value)
    if samples.dtype.kind in "iu":
        peak = np.abs(samples).max(initial=0)
        samples = samples / (2.0**15 if peak <= 2**15 else 2.0**31)
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    return np.asarray(mono, np.float32)
