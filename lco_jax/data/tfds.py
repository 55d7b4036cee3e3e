"""TFDS datasets as records: NLI as triplets, and images, audio or video with captions made from their other features.

Needs no TensorFlow: a dataset must be prepared as array_record (TFDS's `data_source`).
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.captions import Caption, captioned
from lco_jax.data.records import Record, parse_record
from lco_jax.data.scan import ListSource, Scan, Source

NLI = {"premise", "hypothesis", "label"}


def nli_source(
    name: str, split: str = "train", data_dir: str | None = None, on_bad: str = "error"
) -> ListSource:
    """A dataset with `premise`, `hypothesis` and `label` as triplets: premise, entailed, contradicted.

    Every premise that has both gives one triplet per entailed hypothesis, with its contradictions in turn.
    """
    with _reading(name, split, data_dir) as builder:
        features, rows = builder.info.features, builder.as_data_source(split=split)
    if missing := NLI - set(features):
        has = f"no feature {min(missing)!r}, which NLI needs; its features: {', '.join(sorted(features))}"
        tip = "for images, audio or video give a caption, such as 'a {label}'"
        raise LcoError(f"the TFDS dataset {name!r} has {has}; {tip}")
    label_names = getattr(features["label"], "names", None)
    if not label_names:
        raise LcoError(
            f"the TFDS dataset {name!r} has a label without names; it needs a ClassLabel"
        )
    sides: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["label"] >= 0:  # -1: the annotators did not agree
            kind = sides.setdefault(row["premise"].decode(), {})
            kind.setdefault(label_names[row["label"]], []).append(row["hypothesis"].decode())
    scan = Scan(on_bad)
    for premise, kinds in sides.items():
        contradictions = kinds.get("contradiction", [])
        for i, entailed in enumerate(kinds.get("entailment", []) if contradictions else []):
            where = f"tfds:{name}/{split}, premise {premise!r:.40}"
            negative = contradictions[i % len(contradictions)]
            scan.check(
                partial(
                    parse_record,
                    {"anchor": premise, "positive": entailed, "negative": negative},
                    where,
                )
            )
    if not scan.kept and not scan.skipped:
        raise LcoError(
            f"the TFDS dataset {name!r} ({split}) has no premise with an entailment and a contradiction"
        )
    scan.finish(name)
    return ListSource(scan.kept, scan.skipped)


class CaptionedSource(Source):
    """A dataset of images, audio or videos, each with a caption. Rows are read on demand, and only the first at once.

    caption: a template over the other features; a class label is its name, with spaces for underscores. values: of
    some features, what to write instead of each value. feature: which one to take, where several are media. reverse:
    the caption is the anchor. sampling_rate: of audio, in Hz, where the dataset does not say it. fps: of video.

    An image stays as it is stored, encoded; audio is float32 [T] in [-1, 1] and video uint8 [T, H, W, C].
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
        Scan(on_bad)  # nothing is scanned, but a wrong word is a mistake here too
        import tensorflow_datasets as tfds

        self.name, self.where, self.reverse = (
            f"the TFDS dataset {name!r}",
            f"tfds:{name}/{split}",
            reverse,
        )
        with _reading(name, split, data_dir) as builder:
            features = dict(sorted(builder.info.features.items()))  # TFDS reads them in any order
            types = {
                "image": tfds.features.Image,
                "audio": tfds.features.Audio,
                "video": tfds.features.Video,
            }
            kinds = {
                key: kind
                for key in features
                for kind, cls in types.items()
                if isinstance(features[key], cls)
            }
            # ours decodes every image in one way; TFDS's depends on what is installed, and takes palettes for greys
            stored = {
                key: tfds.decode.SkipDecoding() for key, kind in kinds.items() if kind == "image"
            }
            self.rows = builder.as_data_source(split=split, decoders=stored)
        self.feature = self._choose(feature, kinds, features)
        self.kind = kinds[self.feature]
        self.modalities = frozenset({"text", self.kind})
        self.facts = self._facts(features[self.feature], sampling_rate, fps)
        fields = {key: features[key] for key in features if key not in kinds}
        self.labels = {
            key: field.names
            for key, field in fields.items()
            if isinstance(field, tfds.features.ClassLabel)
        }
        self.caption = Caption(caption, list(fields), values, self.name)
        if not len(self.rows):
            raise LcoError(f"{self.name} ({split}) is empty")
        self[0]  # a caption that cannot be made is found now

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.where}, row {index}"
        with explained(
            f"{where} cannot be read", Exception
        ):  # TFDS, protobuf and decoders raise many kinds
            row = self.rows[index]
            if empty := [key for key in (self.feature, *self.caption.fields) if row[key] is None]:
                raise ValueError(f"it has no {empty[0]}")
            fields = {key: _plain(row[key]) for key in self.caption.fields}
            media = {"type": self.kind, self.kind: self._media(row[self.feature])}
        for key in fields.keys() & self.labels.keys():
            if fields[key] < 0:
                raise LcoError(
                    f"{where} has no {key} ({fields[key]}); choose a split whose rows have one"
                )
            fields[key] = self.labels[key][fields[key]].replace("_", " ")
        return captioned(media, self.caption(fields, where), self.reverse, where)

    def _media(self, value: Any) -> Any:
        if self.kind == "video":
            return {"array": np.asarray(value), **self.facts}
        if self.kind == "image" or isinstance(value, bytes):  # audio may be stored as its file, too
            return value
        return {"array": _waveform(value), **self.facts}

    def _choose(
        self, feature: str | None, kinds: Mapping[str, str], features: Iterable[str]
    ) -> str:
        if not kinds:
            raise LcoError(
                f"{self.name} has no feature of images, audio or video; its features: {', '.join(features)}"
            )
        if feature is None and len(kinds) > 1:
            raise LcoError(
                f"{self.name} has several features of media; name one with `feature`: {', '.join(kinds)}"
            )
        if feature not in (None, *kinds):
            raise LcoError(
                f"{self.name} has no feature {feature!r} of media; it has: {', '.join(kinds)}"
            )
        return feature or next(iter(kinds))

    def _facts(
        self, feature: Any, sampling_rate: int | None, fps: float | None
    ) -> dict[str, float]:
        """What goes beside the arrays."""
        given = {"sampling_rate": ("audio", sampling_rate), "fps": ("video", fps)}
        for key, (kind, value) in given.items():
            if value is not None and kind != self.kind:
                raise LcoError(
                    f"{self.name}: {key} is for {kind}, and {self.feature!r} is {self.kind}"
                )
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise LcoError(f"{self.name}: {key} is {value!r}; it must be a number above 0")
        if self.kind == "audio":
            if rate := sampling_rate or feature.sample_rate:
                return {"sampling_rate": rate}
            raise LcoError(
                f"{self.name} does not say the sampling rate of {self.feature!r}; give sampling_rate, in Hz"
            )
        dtype = np.dtype(feature.np_dtype if self.kind == "image" else feature.feature.np_dtype)
        pixels = ("uint8", "uint16") if self.kind == "image" else ("uint8",)
        if dtype.name not in pixels:
            raise LcoError(
                f"{self.name}: {self.feature!r} holds {dtype} pixels, and they must be {', '.join(pixels)}"
            )
        return {} if fps is None else {"fps": fps}


def _plain(value: Any) -> Any:
    """A row's value as strings, numbers, lists and dicts."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, np.ndarray | list) else value


def _waveform(value: Any) -> np.ndarray:
    """Samples [T] or [T, channels] -> mono float32 [T] in [-1, 1]. TFDS keeps PCM as integers, int64 unless told."""
    samples = np.asarray(value)
    if samples.dtype.kind in "iu":
        peak = 2.0**15 if samples.size == 0 or np.abs(samples).max() <= 2**15 else 2.0**31
        samples = samples / peak
    return np.asarray(samples.mean(axis=1) if samples.ndim == 2 else samples, np.float32)


@contextmanager
def _reading(name: str, split: str, data_dir: str | None) -> Iterator[Any]:
    """The dataset's builder. What goes wrong within says which dataset it was."""
    import tensorflow_datasets as tfds

    where = f"the TFDS dataset {name!r} ({split}, data_dir {data_dir}) cannot be read"
    if data_dir is not None and not (folder := Path(data_dir) / name.split(":")[0]).is_dir():
        raise LcoError(f"{where}: there is no folder {folder}")
    # TFDS raises many kinds for one cause: it is not there in this form
    with explained(where, Exception), _numpy_dtypes(tfds.features.Audio, tfds.features.Video):
        yield tfds.builder(name, data_dir=data_dir)


@contextmanager
def _numpy_dtypes(*features: type) -> Iterator[None]:
    """Within, these features take their dtypes from numpy. All they want TensorFlow for when built is `as_dtype`."""
    modules = [sys.modules[feature.__module__] for feature in features]
    before = [module.tf for module in modules]
    for module in modules:
        module.tf = SimpleNamespace(dtypes=SimpleNamespace(as_dtype=np.dtype), string=np.object_)
    try:
        yield
    finally:
        for module, tf in zip(modules, before, strict=True):
            module.tf = tf
