"""mteb's mock tasks through our adapter: every score is that of a torch wrapper of one checkpoint.

The wrapper does what mteb's wrappers do: it walks the loader, whose media come as decoders. PyAV
and soundfile decode here, since torchcodec's wheels need CUDA's libraries. The adapter reads the
files, and must see the same.
"""

import io
from types import SimpleNamespace

import av
import datasets
import jax
import numpy as np
import pytest
import reference  # before mteb, which imports transformers
import soundfile
import soxr
import torch
from mteb import evaluate, mocks
from mteb.models import EncoderProtocol
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from PIL import Image
from reference_media import RATE, user
from threadpoolctl import threadpool_limits

from lco_jax import MediaConfig, OmniEmbedder, make_mesh
from lco_jax.data.instructions import Instructions
from lco_jax.data.prompts import PROMPTS
from lco_jax.evaluation.adapter import Encoder, model_meta
from lco_jax.evaluation.stored_vectors import StoredVectors

pytestmark = pytest.mark.slow
GRIDS = {
    "text": mocks.MOCK_TASK_TEST_GRID,
    "image": mocks.MOCK_MIEB_TASK_GRID,
    "audio": mocks.MOCK_MAEB_TASK_GRID,
    "video": mocks.MOCK_MVEB_TASK_GRID,
    "mixed": mocks.MOCK_MULTIMODAL_TASKS,
}
# their pairs are a clip and itself, once labelled 1 and once 0: rounding decides their scores
TIED = (
    "AbsTaskAudioPairClassification",
    "MockVideoPairClassification",
    "MockVideoAudioPairClassification",
)


def encode_sound(self, value):
    file = io.BytesIO()
    soundfile.write(file, value["array"], value["sampling_rate"], format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def sound(self, value, **_):
    """As torchcodec's AudioDecoder."""
    array, rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32")
    samples = SimpleNamespace(data=torch.from_numpy(array)[None], sample_rate=rate)
    return SimpleNamespace(get_all_samples=lambda: samples)


def film(self, value, **_):
    """As torchcodec's VideoDecoder."""
    with av.open(io.BytesIO(value["bytes"])) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        rate = float(container.streams.video[0].average_rate)
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    metadata = SimpleNamespace(num_frames=len(frames), average_fps=rate)
    return SimpleNamespace(
        metadata=metadata, get_frames_at=lambda indices: SimpleNamespace(data=frames[indices])
    )


class TorchEncoder(AbsEncoder):
    """transformers' model and processor, one input at a time. seen: the vectors of each call."""

    def __init__(self, case, meta):
        self.case, self.mteb_model_meta, self.seen, self.done = case, meta, [], {}

    def encode(self, inputs, **_):
        batches = [
            [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            for batch in inputs
        ]
        self.seen.append(np.stack([self.embed(row) for rows in batches for row in rows]))
        return self.seen[-1]

    def embed(self, row):
        parts, kinds = [], []
        if (picture := row.get("image")) is not None:
            parts, kinds = [{"type": "image", "image": picture.convert("RGB")}], ["image"]
        if (clip := row.get("video")) is not None:  # 2 frames a second, but 4 at least
            frames = np.linspace(0, clip.metadata.num_frames - 1, 4).round().astype(int)
            array = clip.get_frames_at(frames).data.permute(0, 2, 3, 1).numpy()
            parts, kinds = (
                [*parts, {"type": "video", "video": {"array": array, "fps": 2.0}}],
                [*kinds, "video"],
            )
        if (heard := row.get("audio")) is not None:
            samples = heard.get_all_samples()
            array = soxr.resample(
                samples.data[0].numpy(), samples.sample_rate, RATE, quality="HQ"
            )  # as librosa
            parts, kinds = [*parts, {"type": "audio", "audio": {"array": array}}], [*kinds, "audio"]
        if (text := row.get("text")) is not None:
            parts, kinds = [*parts, text], [*kinds, "text"]
        prompt = (
            f"\nSummarize the above {kinds[0]} in one word:"
            if len(kinds) == 1
            else PROMPTS["mixed"]
        )
        key = repr([part if isinstance(part, str) else digest_of(part) for part in parts])
        if key not in self.done:
            self.done[key] = reference.golden(
                self.case.model, self.case.path, [user(*parts, prompt)]
            ).embeddings[0]
        return self.done[key]


def digest_of(part):
    medium = part[part["type"]]
    medium = medium["array"] if isinstance(medium, dict) else np.asarray(medium)
    return part["type"], medium.shape, hash(medium.tobytes())


class Spy(Encoder):
    """Keeps the vectors of each call."""

    seen = ()

    def encode(self, inputs, **options):
        self.seen = [*self.seen, super().encode(inputs, **options)]
        return self.seen[-1]


@pytest.fixture(scope="module")
def encoders(cases, tmp_path_factory):
    """Ours and torch's, of one checkpoint that sees, hears and watches."""
    case = cases["omni"]
    embedder = OmniEmbedder.from_pretrained(case.path, mesh=make_mesh(devices=jax.devices()[:1]))
    meta = model_meta(
        "local/omni", "0", {"max_frames": 64}, modalities=list(embedder.modalities), embed_dim=80
    )
    stored = StoredVectors(tmp_path_factory.mktemp("stored"), {})
    with (
        pytest.MonkeyPatch.context() as patch,
        threadpool_limits(
            1
        ),  # OpenMP's threads wait by spinning, which takes the cores from all others
    ):
        patch.setattr(datasets.Audio, "encode_example", encode_sound)
        patch.setattr(datasets.Audio, "decode_example", sound)
        patch.setattr(datasets.Video, "decode_example", film)
        yield Spy(embedder.encode_blocks, meta, stored, MediaConfig()), TorchEncoder(case, meta)


def scores_of(encoder, task):
    options = {"show_progress_bar": False, "co2_tracker": False, "cache": None}
    (result,) = evaluate(encoder, task, encode_kwargs={"batch_size": 3}, **options).task_results
    return result.scores


def numbers(scores):
    """Every number in scores, by its path."""
    if isinstance(scores, dict | list):
        for key, value in scores.items() if isinstance(scores, dict) else enumerate(scores):
            yield from ((f"{key}/{path}", number) for path, number in numbers(value))
    elif isinstance(scores, float | int):
        yield "", scores


@pytest.mark.parametrize("kind", GRIDS)
def test_scores_of_mock_tasks_are_torchs(encoders, kind):
    ours, torchs = encoders
    assert isinstance(ours, EncoderProtocol)
    for task in GRIDS[kind]:  # each draws its data from a seed when it is made
        ours.seen, torchs.seen = [], []
        got, want = (dict(numbers(scores_of(encoder, type(task)()))) for encoder in (ours, torchs))
        assert len(ours.seen) == len(torchs.seen) > 0
        for mine, theirs in zip(ours.seen, torchs.seen, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=task.metadata.name)
        assert got.keys() == want.keys()
        for name in () if task.metadata.name in TIED else want:
            np.testing.assert_allclose(
                got[name], want[name], atol=1e-4, err_msg=f"{task.metadata.name} {name}"
            )


def test_decoders_and_tensors_give_what_files_give(encoders):
    """Rows whose media were decoded already: torchcodec's decoders, tensors, arrays."""
    ours, _ = encoders
    task = mocks.MockVideoAudioRetrievalVA2T()
    task.load_data()
    queries = task.dataset["default"]["test"]["queries"]
    metadata, clip = task.metadata, queries[0]["video"]
    chosen = torch.linspace(0, clip.metadata.num_frames - 1, 4).round().long()
    array = queries[0]["audio"].get_all_samples().data
    decoded = [
        {"video": clip, "audio": queries[0]["audio"]},
        {
            "video": clip.get_frames_at(chosen).data,
            "audio": {"array": array, "sampling_rate": RATE},
        },
    ]
    want = ours.encode(
        SimpleNamespace(dataset=queries), task_metadata=metadata, hf_split="test", hf_subset="a"
    )[[0, 0]]
    got = ours.encode(
        SimpleNamespace(dataset=decoded), task_metadata=metadata, hf_split="test", hf_subset="a"
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    grey = Image.fromarray(np.arange(80 * 60, dtype=np.uint8).reshape(80, 60))
    pictures = [
        {"image": grey},
        {"image": torch.from_numpy(np.array(grey.convert("RGB"))).permute(2, 0, 1)},
    ]
    got = ours.encode(
        SimpleNamespace(dataset=pictures), task_metadata=metadata, hf_split="test", hf_subset="a"
    )
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)


def test_queries_and_documents_of_a_task_get_their_prompts(tiny, tmp_path):
    """mteb's order of names; and the vector of a text with one prompt is not that with another."""
    embedder = OmniEmbedder(
        tiny.model, tiny.params, tiny.processor, tiny.mesh, Instructions({}, "before")
    )
    metadata = mocks.MockRetrievalTask().metadata
    prompts = {"query": "Any: ", f"{metadata.name}-query": "Mine: ", "document": ""}
    meta = model_meta("local/tiny", "0", {}, modalities=["text"], embed_dim=128)
    stored = StoredVectors(tmp_path, {})
    encoder = Encoder(embedder.encode_blocks, meta, stored, MediaConfig(), prompts)
    rows = SimpleNamespace(dataset=[{"text": "a dog"}, {"text": "two birds on a wire"}])
    texts = [row["text"] for row in rows.dataset]
    wanted = {PromptType.query: "Mine: ", PromptType.document: "", None: None}
    for kind, prompt in wanted.items():
        options = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
        got = encoder.encode(rows, prompt_type=kind, **options)
        np.testing.assert_allclose(got, embedder.encode(texts, prompt=prompt), atol=1e-6)
    assert encoder.embedded == 3 * len(texts)
