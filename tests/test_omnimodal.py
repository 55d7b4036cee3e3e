"""Images, audio and video embed as in transformers, whatever else is in the batch."""

import jax
import numpy as np
import pytest
import reference
from PIL import Image
from reference_media import audio, image, picture, user, video

from lco_jax import OmniEmbedder, make_mesh
from lco_jax.data.media import MediaConfig

TOLERANCE = 1e-5  # tells right from almost right: never loosen it
LIMITS = (3136, 602112)  # pixels of a frame: lets the clips here stay small
FAMILIES = ("vl", "vl_tied", "omni", *reference.LLAVA)
ONE = "\nSummarize the above in one word:"


def prompt(kind):
    return f"\nSummarize the above {kind} in one word:"


IMAGES = {
    "image": [
        user(image(1, 140, 196), prompt("image"))
    ],  # full patches and windows: nothing is resized
    "resized": [user(image(2, 97, 181), prompt("image")), user(image(3, 25, 19), prompt("image"))],
    "square_and_long": [
        user(image(4, 113, 112), prompt("image")),
        user(image(5, 30, 290), prompt("image")),
    ],
    "interleaved": [
        user(
            "One picture: ",
            image(6, 84, 140),
            " then a tall one: ",
            image(7, 252, 70),
            "compare." + ONE,
        )
    ],
    "large": [user("Many windows: ", image(15, 330, 411), prompt("image"))],
    "text": [user(text + prompt("text")) for text in reference.TEXTS[:3]],
    "turns": [
        [
            *user(image(8, 56, 56), "What is this?"),
            {"role": "assistant", "content": [{"type": "text", "text": "A cloud."}]},
            *user("And this?", image(9, 120, 60), ONE),
        ]
    ],
}
VIDEOS = {
    "video": [user(video(1, 6, 84, 140, fps=2.0), prompt("video"))],
    "video_odd_slow": [user("Clip: ", video(2, 7, 70, 120, fps=0.8), prompt("video"))],
    "video_long_then_text": [
        user(video(3, 26, 56, 84, fps=1.0), " and then a few words after it." + prompt("video"))
    ],
    # time in thirds, and in steps whose multiples float32 rounds across an integer
    "video_rates": [
        user(video(4, 14, 56, 56, fps=3.0), ONE),
        user(video(5, 24, 56, 56, fps=25.0), ONE),
    ],
    "video_of_one_frame": [user(video(6, 1, 90, 60, fps=2.0), prompt("video"))],
    "videos_and_image": [
        user(
            video(7, 4, 56, 112, fps=1.0),
            " or ",
            image(10, 100, 80),
            " or ",
            video(8, 3, 112, 56, fps=1.0),
            ONE,
        )
    ],
}
SOUNDS = {
    "audio": [user(audio(1, 1.3), prompt("audio")), user(audio(2, 4.0), prompt("audio"))],
    "audio_long": [user(audio(3, 31.7), prompt("audio"))],
    "audio_short": [user(audio(4, 0.11), prompt("audio")), user(audio(5, 0.4), "and a text" + ONE)],
    "audios_and_image": [
        user("Hear: ", audio(6, 2.2), " see: ", image(11, 84, 140), " hear: ", audio(7, 0.9), ONE)
    ],
    "audio_and_video": [user(audio(8, 1.6), video(9, 6, 56, 84, fps=2.0), ONE)],
}
FILMS = {  # videos with their audio
    "film": [user("Watch: ", video(10, 12, 56, 84, fps=2.0, sound=6.0), prompt("video"))],
    "film_long_pictures": [
        user(video(11, 17, 56, 56, fps=1.0, sound=9.1), " and a text" + prompt("video"))
    ],
    # within the last two seconds, and so in one chunk: what follows starts after the sound
    "film_sound_ends_early": [
        user("Watch: ", video(16, 12, 56, 56, fps=2.0, sound=4.6), prompt("video"))
    ],
    # frames four seconds apart: a chunk of two seconds ends within one
    "film_slow": [user(video(17, 6, 56, 84, fps=0.5, sound=9.7), prompt("video"))],
    "film_long_sound": [user(video(12, 5, 56, 56, fps=2.0, sound=8.3), prompt("video"))],
    "film_among_others": [
        user(
            audio(13, 1.1), image(14, 60, 80), video(15, 9, 56, 56, fps=3.0, sound=3.2), "end" + ONE
        )
    ],
}


def conversations_of(family):
    """Case -> conversations, in one order for all tests."""
    if family.startswith("llava"):
        return IMAGES
    return {**IMAGES, **VIDEOS} | ({**SOUNDS, **FILMS} if family.startswith("omni") else {})


def as_given(smallest=LIMITS[0], largest=LIMITS[1]):
    """Every frame of a clip is kept, and a frame may be small."""
    return MediaConfig(fps=30.0, video_min_pixels=smallest, video_max_pixels=largest)


def one_device():
    """What takes the least time to compile; that the mesh does not matter is tested below."""
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def embedders(cases):
    """Family -> OmniEmbedder on all devices, with the frame limits of these tests."""

    class Embedders(dict):
        def __missing__(self, family):
            self[family] = OmniEmbedder.from_pretrained(cases[family].path, media=as_given())
            return self[family]

    return Embedders()


@pytest.fixture(scope="module")
def goldens(cases):
    """Family -> case -> Golden."""

    class Goldens(dict):
        def __missing__(self, family):
            _, path, model = cases[family]
            self[family] = {
                name: reference.golden(
                    model,
                    path,
                    conversations,
                    video_limits=LIMITS,
                    use_audio_in_video=name in FILMS,
                )
                for name, conversations in conversations_of(family).items()
            }
            return self[family]

    return Goldens()


@pytest.fixture(scope="module")
def vectors(embedders):
    """Family -> case -> our embeddings, all of a family's from one call."""

    class Vectors(dict):
        def __missing__(self, family):
            conversations = conversations_of(family)
            every = embedders[family].encode([c for group in conversations.values() for c in group])
            ends = np.cumsum([len(group) for group in conversations.values()])
            self[family] = dict(zip(conversations, np.split(every, ends[:-1]), strict=True))
            return self[family]

    return Vectors()


EACH = [(family, name) for family in FAMILIES for name in conversations_of(family)]


@pytest.mark.parametrize(("family", "name"), EACH)
def test_tokens_and_positions_equal_transformers(embedders, goldens, family, name):
    want = goldens[family][name]
    got = embedders[family].processor(conversations_of(family)[name])
    for sequence, ids, positions in zip(got, want.input_ids, want.position_ids, strict=True):
        assert sequence.input_ids.dtype == sequence.position_ids.dtype == np.int32
        np.testing.assert_array_equal(sequence.input_ids, ids)
        np.testing.assert_array_equal(sequence.position_ids, positions.T)


@pytest.mark.parametrize(("family", "name"), EACH)
def test_embeddings_equal_transformers(vectors, goldens, family, name):
    got = vectors[family][name]
    assert got.dtype == np.float32
    assert np.abs(got - goldens[family][name].embeddings).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_golden_embeddings_can_tell(cases, goldens, family):
    """Inputs are far from parallel, media matter, and transformers' padded batch agrees."""
    every = np.concatenate([golden.embeddings for golden in goldens[family].values()])
    assert (every @ every.T - 2 * np.eye(len(every))).max() < 0.99
    _, path, model = cases[family]
    seen = [user(image(seed, 84, 140), prompt("image")) for seed in (1, 2)]
    alike = reference.golden(model, path, seen).embeddings
    assert np.abs(alike[0] - alike[1]).max() > 1e-3
    names = ["image", "resized", "interleaved", "text"]
    batch = [conversation for name in names for conversation in IMAGES[name]]
    padded = reference.golden(model, path, batch, together=True).embeddings
    assert (
        np.abs(padded - np.concatenate([goldens[family][name].embeddings for name in names])).max()
        < 5e-6
    )


def test_a_full_omni_checkpoint_embeds_as_its_thinker(cases, goldens):
    """The two are drawn from one seed."""
    ours = OmniEmbedder.from_pretrained(cases["omni_full"].path, media=as_given())
    names = ["interleaved", "video", "audio", "film"]
    batch = [conversation for name in names for conversation in conversations_of("omni")[name]]
    want = np.concatenate([goldens["omni"][name].embeddings for name in names])
    assert np.abs(ours.encode(batch) - want).max() < TOLERANCE


@pytest.mark.parametrize("family", ["vl", "vl_tied"])
def test_video_positions_of_transformers_5(cases, goldens, family):
    _, path, model = cases[family]
    ours = OmniEmbedder.from_pretrained(
        path, mesh=one_device(), media=as_given(), video_positions="5"
    )
    groups = {**VIDEOS, "interleaved": IMAGES["interleaved"]}
    batch = [conversation for group in groups.values() for conversation in group]
    want = reference.golden(model, path, batch, video_limits=LIMITS, video_positions="5")
    for sequence, positions in zip(ours.processor(batch), want.position_ids, strict=True):
        np.testing.assert_array_equal(sequence.position_ids, positions.T)
    assert np.abs(ours.encode(batch) - want.embeddings).max() < TOLERANCE
    older = np.concatenate([goldens[family][name].embeddings for name in groups])
    moved = np.abs(want.embeddings - older).max(axis=1)
    assert moved[:-1].max() > 1e-2
    assert moved[-1] == 0  # images have no time


@pytest.mark.parametrize("family", ["vl", pytest.param("omni", marks=pytest.mark.slow)])
def test_pixel_limits_of_the_checkpoint_the_caller_and_a_part(cases, family):
    _, path, model = cases[family]
    clips = [
        user(video(1, 3, 84, 140, fps=2.0), prompt("video")),
        user(video(2, 4, 150, 240, fps=2.0), ONE),
    ]
    for given in (None, (3136, 20000), (50000, 70000)):
        want = reference.golden(model, path, clips, video_limits=given)
        ours = OmniEmbedder.from_pretrained(
            path, mesh=one_device(), media=as_given(*given or (None, None))
        )
        for sequence, ids in zip(ours.processor(clips), want.input_ids, strict=True):
            np.testing.assert_array_equal(sequence.input_ids, ids)
        assert np.abs(ours.encode(clips) - want.embeddings).max() < TOLERANCE
    parts = [
        user(image(1, 150, 240, max_pixels=12000), prompt("image")),
        user(image(2, 60, 40, min_pixels=20000), "one", image(3, 100, 300, min_pixels=20000), ONE),
        user(image(4, 60, 40, min_pixels=5000, max_pixels=9000), prompt("image")),
    ]
    want = reference.golden(model, path, parts)
    assert np.abs(ours.encode(parts) - want.embeddings).max() < TOLERANCE


@pytest.mark.parametrize("family", ["vl", "llava_mistral"])
def test_inputs_in_every_form(embedders, family, tmp_path):
    """Arrays, PIL images and paths; in chat messages, in mappings and alone."""
    pixels = picture(1, 97, 130)
    file = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(file)
    chat = user({"type": "image", "image": pixels}, prompt("image"))
    forms = [
        {"image": pixels},
        {"image": Image.fromarray(pixels)},
        {"image": file},
        {"image": str(file)},
        Image.fromarray(pixels),
        user({"type": "image", "image": str(file)}, prompt("image")),
    ]
    got = embedders[family].encode([chat, *forms])
    np.testing.assert_allclose(got[1:], np.repeat(got[:1], len(forms), axis=0), atol=1e-6)
    assert embedders[family].encode(Image.fromarray(pixels)).shape == got[0].shape


def test_mappings_of_several_kinds(embedders):
    """Media come before the text, in the mapping's order, and then the prompt that names them."""
    ours = embedders["omni"]
    sound, clip, pixels = (
        audio(1, 1.2)["audio"],
        video(1, 4, 56, 84, fps=2.0)["video"],
        picture(1, 56, 84),
    )
    got = ours.encode(
        [
            {"audio": sound},
            {"video": clip},
            {"text": "A note", "image": pixels},
            sound,
            clip,
            pixels,
        ]
    )
    parts = [
        {"type": "audio", "audio": sound},
        {"type": "video", "video": clip},
        {"type": "image", "image": pixels},
    ]
    alone = [user(part, prompt(part["type"])) for part in parts]
    want = ours.encode([*alone[:2], user(parts[2], "A note" + ONE), *alone])
    np.testing.assert_allclose(got, want, atol=1e-6)


def mixed_batch(family, goldens):
    """32 conversations of every kind, long and short in turn, and their golden embeddings."""
    names = [name for name in conversations_of(family) if name != "audio_long"]
    batch = [conversation for name in names for conversation in conversations_of(family)[name]]
    want = np.concatenate([goldens[family][name].embeddings for name in names])
    order = np.random.default_rng(0).permutation(np.arange(32) % len(batch))
    return [batch[i] for i in order], want[order]


ON_MESHES = [
    ("vl", (8, 1, 1)),
    ("omni", (1, 1, 1)),
    ("omni", (2, 2, 2)),
    ("llava_mistral", (8, 1, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), ON_MESHES)
def test_same_vectors_in_any_batch_and_on_any_mesh(cases, goldens, family, mesh):
    devices = jax.devices()[: int(np.prod(mesh))]
    ours = OmniEmbedder.from_pretrained(
        cases[family].path, mesh=make_mesh(*mesh, devices=devices), media=as_given()
    )
    batch, want = mixed_batch(family, goldens)
    assert np.abs(ours.encode(batch, batch_size=32) - want).max() < TOLERANCE
    assert np.abs(ours.encode(batch[::-1][:10], batch_size=4) - want[::-1][:10]).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["omni"])
def test_same_vectors_alone(cases, goldens, family):
    ours = OmniEmbedder.from_pretrained(cases[family].path, mesh=one_device(), media=as_given())
    for name, conversations in conversations_of(family).items():
        for conversation, want in zip(conversations, goldens[family][name].embeddings, strict=True):
            assert np.abs(ours.encode(conversation) - want).max() < TOLERANCE, name


@pytest.mark.parametrize("family", ["omni", "llava_qwen2"])
def test_an_embedding_does_not_see_its_neighbours_media(embedders, family):
    """Change the picture of one input: every other vector stays."""
    sizes = [(84, 140), (97, 60), (84, 140), (60, 200), (56, 56)]
    batch = [user(image(i, *size), prompt("image")) for i, size in enumerate(sizes)] + [
        user("a text" + prompt("text"))
    ]
    if family == "omni":
        batch += [user(video(1, 4, 56, 84, fps=2.0), ONE), user(audio(1, 1.0), ONE)]
    before = embedders[family].encode(batch)
    for changed in (0, 3, len(batch) - 1 if family == "omni" else 4):
        other = list(batch)
        kind = batch[changed][0]["content"][0]["type"]
        other[changed] = user(
            audio(2, 1.0) if kind == "audio" else image(50, *sizes[changed]),
            batch[changed][0]["content"][1],
        )
        moved = np.abs(embedders[family].encode(other) - before).max(axis=1)
        assert moved[changed] > 1e-3
        assert np.delete(moved, changed).max() < 1e-7
