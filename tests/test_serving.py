"""`lco serve`: every form that clients send, against `encode`; limits, errors, broken clients."""

import asyncio
import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import av
import cohere
import jax
import numpy as np
import openai
import psutil
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.exceptions import HTTPException

from lco_jax import LcoError, MediaConfig, OmniEmbedder, make_mesh, search, serve
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.data.instructions import Instructions
from lco_jax.flags import media_config
from lco_jax.search import query_prompt
from lco_jax.searching.server import BUSY
from lco_jax.serving.ending import ApiServer
from lco_jax.serving.engine import Content
from lco_jax.serving.fair import FairQueue
from lco_jax.serving.fetching import Fetcher, is_public
from lco_jax.serving.page import EngineQueries
from lco_jax.serving.shapes import PassShapes

HOSTS = ("127.0.0.1", "localhost")
TEXTS = ["a red square", "", "a long text, " * 40, "Ein Kreis 🙂", "/etc/passwd.png"]


def png(seed=0, size=(40, 32)):
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def wav(hertz=440):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(16000)
        tone = 12000 * np.sin(2 * np.pi * hertz * np.arange(12000) / 16000)
        out.writeframes(tone.astype("<i2").tobytes())
    return file.getvalue()


def webm(seed=0):
    file = io.BytesIO()
    with av.open(file, "w", "webm") as out:
        stream = out.add_stream("libvpx", rate=8, width=64, height=48, pix_fmt="yuv420p")
        first = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.roll(first, 4 * i, axis=1))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PNG, WAV, WEBM = png(), wav(), webm()
IMAGE = {"type": "image_url", "image_url": {"url": uri(PNG, "image/png"), "detail": "auto"}}
SOUND = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"},
}
SOUND_AT = {"type": "audio_url", "audio_url": {"url": uri(WAV, "audio/wav")}}
CLIP = {"type": "video_url", "video_url": {"url": uri(WEBM, "video/webm")}}
WORDS = {"type": "text", "text": "what is this?"}
# a client's part -> what `encode` takes for it
OURS = [
    (IMAGE, {"type": "image", "image": PNG}),
    (SOUND, {"type": "audio", "audio": WAV}),
    (SOUND_AT, {"type": "audio", "audio": WAV}),
    (CLIP, {"type": "video", "video": WEBM}),
    (WORDS, WORDS),
]
BY_KIND = dict(zip(("image", "input_audio", "audio", "video", "text"), OURS, strict=True))


def arguments(*more):
    flags = ["lco serve", "--model=builtin:lab", "--workers=0", "--warm-tokens=0", *more]
    return serve.make_parser().parse_args(flags[1:])


class Running:
    """A server in a thread of this process, of the model that the flags name."""

    def __init__(self, args, key="", devices=1):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        mesh = make_mesh(devices=jax.devices()[:devices])
        media = media_config(args)
        embedder = OmniEmbedder.from_pretrained(args.model, mesh=mesh, media=media)
        self.api = serve.make_api(args, embedder, media, key)
        self.server = ApiServer(self.api.app(HOSTS), self.api)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    def post(self, path, body, **headers):
        """(status, headers, the JSON) of an answer. body: an object, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, content, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json.load(error)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def vectors(self, **body):
        status, _, answer = self.post("/v1/embeddings", body)
        assert status == 200, answer
        assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
        return np.array([one["embedding"] for one in answer["data"]]), answer

    def end(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.api.engine.close()


@pytest.fixture(scope="module")
def server():
    running = Running(arguments())
    yield running
    running.end()


@pytest.fixture(scope="module")
def reference():
    """The library's own vectors of inputs."""
    mesh = make_mesh(devices=jax.devices()[:1])
    embedder = OmniEmbedder.from_pretrained("builtin:lab", mesh=mesh)
    known = {}

    def encode(inputs, **options):
        asked = repr((inputs, options))
        if asked not in known:
            known[asked] = embedder.encode(inputs, **options)
        return known[asked]

    return encode


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# ---- OpenAI's and vLLM's form


def test_texts_are_as_encode_has_them(server, reference):
    expected = reference([{"text": text} for text in TEXTS])
    found, answer = server.vectors(input=TEXTS, model="builtin:lab", user="someone")
    same(found, expected)
    same(server.vectors(input=TEXTS[0])[0], expected[:1])
    ids = [server.api.engine.preparation([({"text": text}, "")])[0].input_ids for text in TEXTS]
    count = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (answer["object"], answer["model"]) == ("list", "builtin:lab")


def test_token_ids_are_those_of_a_text(server, reference):
    tokenizer = server.api.reader.tokenizer
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS if text]
    expected = reference([{"text": text} for text in TEXTS if text])
    same(server.vectors(input=ids)[0], expected)
    same(server.vectors(input=ids[0])[0], expected[:1])
    same(server.vectors(input=[ids[0], TEXTS[2]])[0], expected[:2])


@pytest.mark.parametrize("kind", [*BY_KIND, "mixed"])
def test_chats_stay_as_they_are(server, reference, kind):
    theirs, ours = zip(*(OURS if kind == "mixed" else [BY_KIND[kind]]), strict=True)
    summary = {"type": "text", "text": "\nSummarize the above in one word:"}
    chat = [{"role": "user", "content": [*theirs, summary]}]
    expected = reference([[{"role": "user", "content": [*ours, summary]}]])
    same(server.vectors(messages=chat)[0], expected)
    same(server.vectors(input=chat)[0], expected)
    same(server.vectors(messages=[chat, chat])[0], expected[[0, 0]])
    same(server.vectors(input=[chat, chat])[0], expected[[0, 0]])


@pytest.mark.parametrize("kind", [*BY_KIND, "mixed"])
def test_contents_without_a_role_get_the_prompt(server, reference, kind):
    theirs, ours = zip(*(OURS if kind == "mixed" else [BY_KIND[kind]]), strict=True)
    expected = reference([{"content": list(ours)}, {"text": "a text"}])
    found, _ = server.vectors(input=[{"content": list(theirs)}, "a text"])
    same(found, expected)
    status, _, answer = server.post("/v2/embed", {"inputs": [{"content": list(theirs)}]})
    assert status == 200, answer
    same(answer["embeddings"]["float"], expected[:1])


def test_several_turns_and_vllms_continued_answer(server, reference):
    turns = [
        {"role": "system", "content": "You are a lens."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    listed = [{"role": one["role"], "content": one["content"]} for one in turns]
    expected = reference([listed])
    same(server.vectors(messages=turns)[0], expected)
    empty = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    more = {"continue_final_message": True, "add_special_tokens": True}
    same(server.vectors(messages=[*turns, empty], **more)[0], expected)


def test_base64_and_fewer_dimensions(server, reference):
    expected = reference([{"text": text} for text in TEXTS], truncate_dim=64)
    same(server.vectors(input=TEXTS, dimensions=64)[0], expected)
    _, answer = server.vectors(input=TEXTS, dimensions=64, encoding_format="base64")
    bytes_ = [base64.b64decode(one["embedding"]) for one in answer["data"]]
    same([np.frombuffer(one, "<f4") for one in bytes_], expected)


def test_requests_of_many_clients_are_joined(server, reference):
    texts = [f"text number {i}" + i % 7 * " and more" for i in range(96)]
    expected = reference([{"text": text} for text in texts])
    before = passes_and_inputs(server)
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda text: server.vectors(input=text)[0][0], texts))
    same(found, expected)
    until(lambda: passes_and_inputs(server)[1] >= before[1] + len(texts))
    assert passes_and_inputs(server)[0] - before[0] < len(texts), "no pass had two inputs"


def passes_and_inputs(server):
    """How many passes of texts there were, and how many inputs they had."""
    names = ("lco_pass_inputs_count", "lco_pass_inputs_sum")
    passes, inputs = (samples(server, name).get(("text",), 0) for name in names)
    return passes, inputs


def test_several_devices_share_the_inputs(reference):
    running = Running(arguments(), devices=2)
    try:
        same(running.vectors(input=TEXTS)[0], reference([{"text": text} for text in TEXTS]))
        same(running.vectors(input=[{"content": [IMAGE]}])[0], reference([{"image": PNG}]))
    finally:
        running.end()


def samples(server, name):
    """The values of a metric: labels -> value."""
    text = server.get("/metrics").decode()
    return {
        tuple(one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name
    }


# ---- Cohere's form


def test_coheres_texts_and_types(server, reference):
    expected = reference([{"text": text} for text in TEXTS])
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = {"texts": TEXTS, "input_type": "search_query", "embedding_types": types}
    status, _, answer = server.post("/v2/embed", {"model": "lab", **body}, **{"x-client-name": "t"})
    assert status == 404
    assert answer["message"].startswith("there is no model 'lab'")
    status, _, answer = server.post("/v2/embed", body)
    assert status == 200, answer
    found = answer["embeddings"]
    same(found["float"], expected)
    same([np.frombuffer(base64.b64decode(one), "<f4") for one in found["base64"]], expected)
    for kind in ("int8", "uint8"):
        levels = np.array(found[kind], float) - (128 if kind == "uint8" else 0)
        cosines = (levels * expected).sum(1) / np.linalg.norm(levels, axis=1)
        assert (cosines > 0.999).all()
        assert (np.abs(levels).max(axis=1) == 127).all()
    assert np.array_equal(found["ubinary"], np.packbits(expected > 0, axis=1))
    signed = np.packbits(expected > 0, axis=1).astype(int) - 128
    assert np.array_equal(found["binary"], signed)
    assert answer["texts"] == TEXTS
    assert answer["response_type"] == "embeddings_by_type"
    assert answer["meta"]["api_version"] == {"version": "2"}


def test_cohere_cuts_what_is_too_long(server, reference):
    body = {"texts": ["one two three " * 3000], "output_dimension": 32}
    assert server.post("/v2/embed", body)[0] == 200  # END is its default
    status, _, answer = server.post("/v2/embed", {**body, "truncate": "NONE"})
    assert (status, answer["message"][:9]) == (400, "texts[0]:")
    tokenizer, room = server.api.reader.tokenizer, server.api.reader.room
    ids = tokenizer(body["texts"][0], add_special_tokens=False).input_ids
    for cut, kept in (("START", ids[-room:]), ("END", ids[:room])):
        _, _, answer = server.post("/v2/embed", {**body, "truncate": cut})
        expected = reference([{"text": tokenizer.decode(kept)}], truncate_dim=32)
        same(answer["embeddings"]["float"], expected)


# ---- the prompts of a model, and how many numbers its vectors have

DOCUMENT = "A document.\n"
PROMPTS = {
    "of both": {"query": "Find what this says: ", "document": DOCUMENT},
    "of documents alone": {"query": "", "document": DOCUMENT},
    "of which one is long": {"query": "Find what this says, word for word. " * 9, "document": ""},
}


@pytest.fixture(scope="module", params=PROMPTS)
def prompted(request, tmp_path_factory):
    """A server of a model that was trained with prompts, whose vectors have 64 numbers."""
    folder = tmp_path_factory.mktemp("prompted") / "merged"
    usage = Usage("last", Instructions(PROMPTS[request.param], "before", "document"), 64)
    export_merged("builtin:lab", folder, dtype="float32", usage=usage)
    running = Running(arguments(f"--model={folder}"))
    yield running
    running.end()


def test_inputs_get_the_prompts_of_the_model(prompted):
    model = prompted.api.engine.embedder
    plain, queries, documents = (
        encode([{"text": text} for text in TEXTS])
        for encode in (model.encode, model.encode_query, model.encode_document)
    )
    assert np.abs(queries - documents).max() > 1e-3
    same(prompted.vectors(input=TEXTS)[0], plain)
    for kind, expected in (
        ("search_query", queries),
        ("search_document", documents),
        ("classification", plain),
    ):
        status, _, answer = prompted.post("/v2/embed", {"texts": TEXTS, "input_type": kind})
        assert status == 200, answer
        same(answer["embeddings"]["float"], expected)
    body = {"images": [uri(PNG, "image/png")], "input_type": "search_query"}
    _, _, answer = prompted.post("/v2/embed", body)
    same(answer["embeddings"]["float"], model.encode_query([{"image": PNG}]))


def test_queries_of_the_page_get_the_prompt_of_queries(prompted):
    engine = prompted.api.engine
    prompt = query_prompt(arguments(), engine.embedder)
    queries = EngineQueries(engine, 60, prompt, 64)
    for part, ours in (
        ({"type": "text", "text": "a dog"}, {"text": "a dog"}),
        ({"type": "image", "image": PNG}, {"image": PNG}),
    ):
        found = queries.embed(queries.prepare([part], "the query"))
        same(found, engine.embedder.encode_query(ours))


def test_clients_are_told_how_many_numbers_they_get(prompted):
    [about] = json.loads(prompted.get("/v1/models"))["data"][:1]
    found, _ = prompted.vectors(input="a text")
    assert (about["dimension"], found.shape) == (64, (1, 64))
    assert prompted.vectors(input="a text", dimensions=100)[0].shape == (1, 100)


@pytest.mark.parametrize("cut", ["START", "END"])
@pytest.mark.parametrize("kind", ["search_query", "search_document"])
def test_cohere_cuts_to_the_room_beside_each_prompt(prompted, kind, cut):
    body = {"texts": ["one two three " * 3000], "input_type": kind, "truncate": cut}
    status, _, answer = prompted.post("/v2/embed", body)
    assert status == 200, answer["message"]
    tokens = answer["meta"]["billed_units"]["input_tokens"]
    most = prompted.api.engine.embedder.processor.max_tokens
    assert most - 2 <= tokens <= most, "more was cut than had to be"


# ---- official clients


def test_openais_client(server, reference):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    expected = reference([{"text": text} for text in TEXTS])
    found = client.embeddings.create(model="builtin:lab", input=TEXTS)  # as base64
    same([one.embedding for one in found.data], expected)
    found = client.embeddings.create(
        model="builtin:lab", input=TEXTS, dimensions=16, encoding_format="float"
    )
    assert len(found.data[0].embedding) == 16
    chat = [{"role": "user", "content": [IMAGE, SOUND, CLIP, WORDS]}]
    body = {"messages": chat, "model": "builtin:lab", "encoding_format": "float"}
    answer = client.post(
        "/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body
    )  # vLLM's example
    ours = [one for key, (_, one) in BY_KIND.items() if key != "audio"]
    same([answer.data[0].embedding], reference([[{"role": "user", "content": ours}]]))
    assert [one.id for one in client.models.list()] == ["builtin:lab"]
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="builtin:lab", input=["a", 3])
    assert refused.value.param == "input[1]"


def test_openais_asynchronous_client(server, reference):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked = (client.embeddings.create(model="builtin:lab", input=text) for text in TEXTS)
        return [one.data[0].embedding for one in await asyncio.gather(*asked)]

    same(asyncio.run(ask()), reference([{"text": text} for text in TEXTS]))


def test_coheres_client(server, reference):
    client = cohere.ClientV2(api_key="none", base_url=server.url)
    options = {"model": "builtin:lab", "embedding_types": ["float", "binary"]}
    found = client.embed(texts=TEXTS, input_type="search_document", **options)
    same(found.embeddings.float_, reference([{"text": text} for text in TEXTS]))
    found = client.embed(images=[uri(PNG, "image/png")], input_type="image", **options)
    same(found.embeddings.float_, reference([{"image": PNG}]))
    mixed = [{"content": [{"type": "text", "text": "what is this?"}, IMAGE]}]
    found = client.embed(inputs=mixed, input_type="search_document", **options)
    ours = {"content": [WORDS, {"type": "image", "image": PNG}]}
    same(found.embeddings.float_, reference([ours]))
    with pytest.raises(cohere.core.ApiError) as refused:
        client.embed(texts=TEXTS, input_type="search_document", **{**options, "model": "other"})
    assert refused.value.status_code == 404


def test_langchains_client(server, reference):
    client = OpenAIEmbeddings(
        model="builtin:lab",
        base_url=f"{server.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,  # else it sends the token ids of another model
    )
    expected = reference([{"text": text} for text in TEXTS])
    same(client.embed_documents(TEXTS), expected)
    same(client.embed_query(TEXTS[0]), expected[0])


def test_llamaindexs_client(server, reference):
    client = OpenAIEmbedding(
        model_name="builtin:lab", api_base=f"{server.url}/v1", api_key="none", dimensions=64
    )
    texts = [text for text in TEXTS if text]
    expected = reference([{"text": text} for text in texts], truncate_dim=64)
    same(client.get_text_embedding_batch(texts), expected)
    same(client.get_query_embedding(texts[0]), expected[0])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server, reference):
    body = json.dumps({"input": TEXTS[0]})
    header = "content-type: application/json"
    command = ["curl", "-sf", f"{server.url}/v1/embeddings", "-H", header, "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    same(answer["data"][0]["embedding"], reference({"text": TEXTS[0]}))


# ---- mistakes of clients


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "must be given"),
        ({"input": []}, "input", "empty"),
        ({"input": 3}, "input", "int 3"),
        ({"input": ["a", None]}, "input[1]", "NoneType"),
        ({"input": [[1, 2], [3, -1]]}, "input[1][1]", "from 0 to"),
        ({"input": [[1, True]]}, "input[0][1]", "bool"),
        ({"input": ["a", "b \ud800"]}, "input[1]", "surrogate"),
        ({"input": ["a", "far too long " * 9000]}, "input[1]", "tokens"),
        ({"input": "a", "messages": []}, "input", "not both"),
        ({"input": "a", "dimension": 4}, "dimension", "unknown"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1 to 192"),
        ({"input": "a", "dimensions": 193}, "dimensions", "from 1 to 192"),
        ({"input": "a", "dimensions": True}, "dimensions", "from 1 to 192"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64"),
        ({"input": "a", "add_generation_prompt": False}, "add_generation_prompt", "only be true"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "list of parts"),
        ({"messages": [{"content": "a"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, None, "type of a part"),
        ({"input": [{"content": [{"type": "text"}]}]}, "input[0].content[0].text", "string"),
        ({"input": ["a" * 3] * 2049}, "input", "at most 2,048"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_place(server, body, param, says):
    status, _, answer = server.post("/v1/embeddings", body)
    error = answer["error"]
    assert status == 400, answer
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("context_length_exceeded" if says == "tokens" else None)
    assert says in error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param
        assert error["message"].startswith(param.partition("[")[0])


@pytest.mark.parametrize(
    "address", ["/etc/passwd.png", "file:///etc/hosts", "cat.png", "ftp://a/b"]
)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
def test_no_file_of_the_server_is_read(server, address, kind):
    for value in (address, {"url": address}):
        part = {"type": kind, kind: value}
        for body in (
            {"input": [{"content": [part]}]},
            {"messages": [{"role": "user", "content": [part]}]},
        ):
            status, _, answer = server.post("/v1/embeddings", body)
            assert (status, "data: URI" in answer["error"]["message"]) == (400, True)
    status, _, answer = server.post("/v2/embed", {"images": [address]})
    assert (status, "data: URI" in answer["message"]) == (400, True)


@pytest.mark.parametrize(
    ("medium", "says"),
    [
        (uri(b"no picture", "image/png"), "in no format"),
        (uri(PNG[:80], "image/png"), "cannot be decoded"),
        ("data:image/png;base64,***", "not valid base64"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "empty"),
        ("https://example.org/a.png", "fetches none"),
    ],
)
def test_a_bad_medium_is_named(server, medium, says):
    part = {"type": "image_url", "image_url": {"url": medium}}
    body = {"input": ["a text", {"content": [part]}]}
    status, _, answer = server.post("/v1/embeddings", body)
    assert status == 400
    assert answer["error"]["param"].startswith("input[1]")
    assert says in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"[1, 2]", "JSON object"),
        (b'{"input": "a"', "no JSON"),
        (b'{"input": "\xff"}', "no JSON"),
        (b'{"input": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"input": ' + b"9" * 10_000 + b"}", "no JSON"),
        (b'{"input": [' + b"0," * 2_000_000 + b"0]}", "more than 1,000,000 values"),
        (b'{"input": ' + b"[" * 2_000_000, "more than 1,000,000 values"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/embed"])
def test_broken_json_is_said_so_in_each_apis_shape(server, path, body, says):
    status, _, answer = server.post(path, body)
    message = answer["error"]["message"] if path.startswith("/v1") else answer["message"]
    assert (status, says in message) == (400, True), message


def test_addresses_and_types_that_are_not_served(server):
    assert server.post("/v1/chat/completions", {})[0] == 404
    assert server.post("/v1/models", {})[0] == 405
    assert server.post("/v1/embeddings", {"input": "a"}, **{"content-type": "text/plain"})[0] == 415
    refused = urllib.request.Request(server.url + "/health", headers={"host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(refused, timeout=60)
    assert server.get("/health") == b""


def test_a_key_is_asked_for(reference):
    running = Running(arguments(), key="a secret")
    try:
        asked = {"input": "a"}
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic !"}):
            status, _, answer = running.post("/v1/embeddings", asked, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert running.post("/v1/embeddings", asked, authorization="Bearer a secret")[0] == 200
        basic = base64.b64encode(b"anyone:a secret").decode()
        assert running.post("/v2/embed", {"texts": ["a"]}, authorization=f"Basic {basic}")[0] == 200
        assert running.get("/health") == b""
        with pytest.raises(urllib.error.HTTPError, match="401"):
            running.get("/metrics")
    finally:
        running.end()


# ---- what a server does when it is busy, or ends


class Held:
    """Makes the passes of an engine wait."""

    def __init__(self, engine, monkeypatch):
        self.free = threading.Event()
        self.passes = []
        embed = engine.embedder.embed

        def held(ready, **options):
            self.passes.append(len(ready))
            assert self.free.wait(60)
            return embed(ready, **options)

        monkeypatch.setattr(engine.embedder, "embed", held)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_full_queue_refuses_and_says_when_to_come_again(server, monkeypatch):
    held = Held(server.api.engine, monkeypatch)
    monkeypatch.setattr(server.api.engine.lanes["text"], "most", 3)
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(server.post, "/v1/embeddings", {"input": "a"}) for _ in range(3)]
        until(lambda: server.api.engine.under_way("text") == 3)
        status, headers, answer = server.post("/v1/embeddings", {"input": "b"})
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(headers["retry-after"]) <= 60
        status, headers, answer = server.post("/v2/embed", {"texts": ["b"]})
        assert (status, "message" in answer, int(headers["retry-after"]) >= 1) == (429, True, True)
        held.free.set()
        assert [one.result()[0] for one in first] == [200] * 3
    until(lambda: server.api.engine.under_way("text") == 0)


def test_a_refusal_has_the_shape_of_what_was_asked(server, monkeypatch):
    monkeypatch.setattr(server.api, "is_ending", True)
    ends = "the server ends; ask another one"
    status, _, answer = server.post("/v1/embeddings", {"input": "a"})
    assert (status, answer["error"]["message"]) == (503, ends)
    status, _, answer = server.post("/v2/embed", {"texts": ["a"]})
    assert (status, answer["message"]) == (503, ends)
    form = {"content-type": "application/x-www-form-urlencoded"}
    status, headers, answer = server.post("/search", b"text=a", **form)
    assert (status, headers["retry-after"], answer) == (503, "5", {"error": ends})


def test_a_busy_engine_asks_the_page_to_come_again(server, monkeypatch):
    held = Held(server.api.engine, monkeypatch)
    queries = EngineQueries(server.api.engine, 0.3, server.api.engine.preparation.prompt, 192)
    query = queries.prepare([{"type": "text", "text": "a dog"}], "the query")
    with pytest.raises(HTTPException) as late:
        queries.embed(query)
    monkeypatch.setattr(server.api.engine.lanes["text"], "most", 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, "/v1/embeddings", {"input": "a"})
        until(lambda: server.api.engine.under_way("text") == 1)
        with pytest.raises(HTTPException) as full:
            queries.embed(query)
        held.free.set()
        assert first.result()[0] == 200
    for refused in (late, full):
        assert (refused.value.status_code, refused.value.detail) == (503, BUSY)
    until(lambda: server.api.engine.under_way("text") == 0)


def test_a_querys_own_timeout_is_not_told_as_busy(server):
    def load():
        raise TimeoutError("of a test")

    queries = EngineQueries(server.api.engine, 60, server.api.engine.preparation.prompt, 192)
    with pytest.raises(TimeoutError, match="of a test"):
        queries.embed(Content("the query", load, has_media=False))


def test_a_client_that_goes_away_is_dropped_before_its_pass(server, monkeypatch):
    held = Held(server.api.engine, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, "/v1/embeddings", {"input": "first"})
        until(lambda: held.passes)
        content = json.dumps({"input": ["gone"] * 50}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        gone = []
        for _ in range(8):
            gone.append(socket.create_connection(("127.0.0.1", server.port)))
            gone[-1].sendall(head.encode() + content)
        until(lambda: server.api.engine.under_way("text") == 401)
        for one in gone:
            one.close()
        until(lambda: server.api.engine.under_way("text") == 1)
        held.free.set()
        assert first.result()[0] == 200
        assert server.post("/v1/embeddings", {"input": "last"})[0] == 200
    assert sum(held.passes) == 2, "inputs that nobody waits for were embedded"


def test_a_request_that_takes_too_long_is_given_up(server, monkeypatch):
    held = Held(server.api.engine, monkeypatch)
    monkeypatch.setattr(server.api, "limits", replace(server.api.limits, seconds=0.3))
    status, _, answer = server.post("/v1/embeddings", {"input": "a"})
    assert (status, answer["error"]["type"]) == (504, "server_error")
    held.free.set()
    until(lambda: server.api.engine.under_way("text") == 0)


def test_one_input_that_fails_in_the_model_fails_alone(server, reference, monkeypatch, caplog):
    embed = server.api.engine.embedder.embed
    bad = server.api.engine.preparation([({"text": "a bad one"}, "")])[0].input_ids
    free = threading.Event()

    def failing(ready, **options):
        assert free.wait(60)
        if any(np.array_equal(one.input_ids, bad) for one in ready):
            raise ZeroDivisionError("of a test")
        return embed(ready, **options)

    monkeypatch.setattr(server.api.engine.embedder, "embed", failing)
    with ThreadPoolExecutor(6) as pool:
        texts = ["one", "two", "a bad one", "three", "four", "five"]
        asked = [pool.submit(server.post, "/v1/embeddings", {"input": text}) for text in texts]
        until(lambda: server.api.engine.under_way("text") == 6)
        free.set()
        answers = [one.result() for one in asked]
    assert [one[0] for one in answers] == [200, 200, 500, 200, 200, 200]
    assert answers[2][2]["error"]["type"] == "server_error"
    assert "of a test" in caplog.text, "the log has no traceback"
    assert samples(server, "lco_requests_total")[("/v1/embeddings", "500")] == 1


def test_texts_pass_media_that_are_decoded(server, monkeypatch):
    free = threading.Event()
    load = server.api.engine.preparation.processor.codec.load

    def slow(part, name):
        assert free.wait(60)
        return load(part, name)

    monkeypatch.setattr(server.api.engine.preparation.processor.codec, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        clip = pool.submit(server.post, "/v1/embeddings", {"input": [{"content": [CLIP]}]})
        until(lambda: server.api.engine.under_way("media") == 1)
        assert server.post("/v1/embeddings", {"input": "a text"})[0] == 200
        assert not clip.done()
        free.set()
        assert clip.result()[0] == 200


@dataclass
class Thing:
    """What waits in a queue."""

    turn: int
    number: int = 0
    is_wanted: bool = True


def test_the_queue_goes_by_turns_and_drops_what_nobody_wants():
    dropped = []
    queue = FairQueue(dropped.append)
    queue.put([Thing(turn, number=1) for turn in range(100)])
    assert [one.turn for one in queue.take(10)] == list(range(10))
    gone = Thing(3, is_wanted=False)
    queue.put([gone])
    queue.put([Thing(10, number=2)])
    assert [(one.turn, one.number) for one in queue.take(3)] == [(10, 1), (10, 2), (11, 1)]
    assert dropped == [gone]
    even = queue.take(4, lambda chosen, one: one.turn % 2 == chosen[0].turn % 2)
    assert [one.turn for one in even] == [12, 14, 16, 18]
    assert [one.turn for one in queue.take(2)] == [13, 15]
    queue.close()
    assert queue.take(1) == []


def test_one_text_passes_a_request_with_many(server, monkeypatch):
    held = Held(server.api.engine, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(server.post, "/v1/embeddings", {"input": ["one of many"] * 1000})
        until(lambda: held.passes)
        one = pool.submit(server.post, "/v1/embeddings", {"input": "one"})
        until(lambda: server.api.engine.under_way("text") == 1001)
        time.sleep(0.5)  # until it is prepared
        held.free.set()
        assert one.result()[0] == 200
        assert sum(held.passes) < 400
        assert many.result()[0] == 200


@pytest.mark.parametrize("shortest", [20, 41])
def test_passes_have_few_shapes(shortest):
    shapes = PassShapes(shortest, 32768)
    assert len(shapes.of_texts(512)) <= 40
    assert len(shapes.widths) < 30
    assert shapes.widths[-1] >= 32768
    assert all(one < wider for one, wider in pairwise(shapes.widths))


# ---- fetching


@pytest.fixture
def host():
    """A server of pictures, which counts who asked, and moves some of them."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            moved = self.path.startswith("/moved")
            self.send_response(302 if moved else 200 if self.path == "/a.png" else 404)
            if moved:
                self.send_header("location", "/a.png" if self.path == "/moved" else self.path)
            self.send_header("content-length", "0" if moved else str(len(PNG)))
            self.end_headers()
            if not moved:
                self.wfile.write(PNG)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        found.asked = []
        found.url = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_media_are_fetched_where_that_is_allowed(host):
    fetch = Fetcher(MediaConfig(), allow_private=True)
    assert fetch(f"{host.url}/a.png", "it") == PNG
    assert fetch(f"{host.url}/moved", "it") == PNG
    for path, says in (("/b.png", "answers 404"), ("/moved/round", "more than 5 times")):
        with pytest.raises(LcoError, match=says):
            fetch(host.url + path, "it")
    with pytest.raises(LcoError, match="max_file_bytes is 10"):
        Fetcher(MediaConfig(max_file_bytes=10), allow_private=True)(f"{host.url}/a.png", "it")


def test_a_server_fetches_where_that_is_allowed(host, reference):
    running = Running(arguments("--allow-remote", "--allow-private"))
    part = {"type": "image_url", "image_url": {"url": f"{host.url}/a.png"}}
    missing = {"type": "image_url", "image_url": f"{host.url}/b.png"}
    try:
        found, _ = running.vectors(input=[{"content": [part]}])
        same(found, reference([{"content": [{"type": "image", "image": PNG}]}]))
        status, _, answer = running.post("/v1/embeddings", {"input": [{"content": [missing]}]})
        assert (status, "answers 404" in answer["error"]["message"]) == (400, True)
    finally:
        running.end()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("2002:808:808::1", True),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::169.254.169.254", False),
        ("2002:7f00:1::", False),
        ("2002:c0a8:1::1", False),
        ("fe80::1%lo", False),
        ("64:ff9b::224.0.0.1", False),
    ],
)
def test_addresses_that_lead_to_others_are_as_these(address, public):
    assert is_public(address) == public


@pytest.mark.parametrize(
    "address",
    ["localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "0"],
)
def test_private_addresses_are_not_asked(host, address):
    with pytest.raises(LcoError, match="leads to a private address"):
        Fetcher(MediaConfig())(f"http://{address}:{host.server_port}/a.png", "it")
    assert not host.asked


# ---- mistakes of those who start it


@pytest.fixture
def said(run_command, monkeypatch):
    """What a start says that ends before the model is loaded."""

    def no_model(*args, **options):
        pytest.fail("the model is loaded")

    monkeypatch.setattr(OmniEmbedder, "from_pretrained", no_model)

    def said(*flags, command=serve):
        code, _, error = run_command(command, "--port=0", *flags)
        assert (code, error.count("\n")) == (2, 1), error
        return error

    return said


@pytest.mark.parametrize(
    "flag",
    ["--truncate-dim=8", "--precision=int8", "--calibration=9", "--by-signs", "--ann"],
)
def test_flags_of_the_index_go_with_the_page(said, flag):
    name = flag.partition("=")[0]
    assert f"{name} is of the page's index; give --input and --index, too" in said(flag)


@pytest.fixture
def page_flags(tmp_path):
    """Of a page, of one picture."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PNG)
    return f"--input={tmp_path / 'in'}", f"--index={tmp_path / 'index'}"


@pytest.mark.parametrize("command", [serve, search])
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--prompt-name=web", "--prompt-name=web: the model has the prompts text, image"),
        ("--truncate-dim=9999", "--truncate-dim=9999: the model's vectors have"),
        ("--calibration=9", "--calibration goes with --precision=int8 or uint8"),
        ("--input=in.parquet", "--input=in.parquet: search takes a folder of media, a .jsonl"),
    ],
)
def test_flags_are_checked_before_the_model_is_loaded(said, page_flags, command, flag, says):
    if flag.startswith("--input"):
        page_flags = page_flags[1:]
    assert says in said(*page_flags, flag, command=command)


def test_a_prompt_that_the_model_does_not_have_is_refused_without_a_page(said):
    assert "--prompt-name=web: the model has the prompts text, image" in said("--prompt-name=web")


def test_an_index_of_others_is_refused_by_the_flag_that_gave_it(
    run_command, monkeypatch, load, page_flags, tmp_path
):
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "vectors.parquet").touch()
    code, _, error = run_command(serve, "--port=0", *page_flags)
    assert (code, "is of no index of ours; give another --index\n" in error) == (2, True), error


# ---- a real process


class Process:
    """`lco serve` as a user starts it."""

    def __init__(self, *flags, **environment):
        command = [sys.executable, "-m", "lco_jax", "serve", "--model=builtin:lab", "--port=0"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "XLA_FLAGS": ""},
        )
        line = self.process.stdout.readline()
        assert "http://" in line, line + self.process.stderr.read()
        self.url = line.split()[1].removesuffix("/v1/embeddings")
        self.port = int(self.url.rsplit(":", 1)[1])

    post = Running.post
    get = Running.get


@pytest.fixture(scope="module")
def process():
    running = Process("--warm-tokens=64", "--workers=1")
    yield running
    running.process.kill()
    running.process.communicate()


def bomb():
    """A picture of 900 million pixels in a few bytes."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def broken_client(port, kind):
    """What some clients do."""
    content = json.dumps({"input": ["a text"] * 20}).encode()
    length = {"cut": len(content) + 10, "lying": 10**9, "slow": 10**6}.get(kind, len(content))
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    with closing(client), suppress(OSError):
        if kind == "garbage":
            client.sendall(os.urandom(2000))
        elif kind == "silent":
            client.sendall(head[:30])
            time.sleep(1)
        elif kind == "slow":
            client.sendall(head)
            for byte in content[:10]:
                client.sendall(bytes([byte]))
                time.sleep(0.1)
        elif kind in ("deep", "picture"):
            part = {"type": "image_url", "image_url": {"url": uri(bomb(), "image/png")}}
            picture = json.dumps({"input": [{"content": [part]}]}).encode()
            body = picture if kind == "picture" else b'{"input": ' + b"[" * 900_000
            client.sendall(head.replace(str(length).encode(), str(len(body)).encode()) + body)
            assert client.recv(100).startswith(b"HTTP/1.1 400")
        else:  # it does not wait for an answer
            client.sendall(head + content)


@pytest.mark.slow
def test_broken_clients_harm_nobody(process, reference):
    expected = reference([{"text": text} for text in TEXTS])
    kinds = ["garbage", "silent", "slow", "deep", "picture", "vanishing", "cut", "lying"]
    server = psutil.Process(process.process.pid)
    ended = threading.Event()
    wrong = []

    def good():
        while not ended.is_set():
            status, _, answer = process.post("/v1/embeddings", {"input": TEXTS})
            if status != 200:
                wrong.append(answer)
                return
            found = np.array([one["embedding"] for one in answer["data"]])
            if np.abs(found - expected).max() > 1e-6:
                wrong.append(found)

    def round_of(count):
        with ThreadPoolExecutor(32) as pool:
            list(
                pool.map(lambda i: broken_client(process.port, kinds[i % len(kinds)]), range(count))
            )
        return server.memory_info().rss

    friend = threading.Thread(target=good)
    friend.start()
    first = round_of(64)
    second = round_of(128)
    ended.set()
    friend.join(120)
    assert not friend.is_alive(), "a request hangs"
    assert not wrong, wrong[0]
    assert second < first + 200e6, "memory grows"
    until(lambda: 'waiting_inputs{lane="text"} 0.0' in process.get("/metrics").decode())


@pytest.mark.slow
def test_nothing_is_compiled_under_load(process):
    def programs():
        return float(
            process.get("/metrics").decode().partition("\nlco_decoder_programs ")[2].split()[0]
        )

    before = programs()
    with ThreadPoolExecutor(20) as pool:
        for count in (1, 3, 20, 64):
            texts = [f"text number {i}" + i % 9 * " and" for i in range(count)]
            assert all(
                status == 200
                for status, _, _ in pool.map(
                    lambda text: process.post("/v1/embeddings", {"input": text}), texts
                )
            )
    assert programs() == before


@pytest.mark.slow
def test_the_search_page_is_served_with_the_same_model(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(seed))
    (folder / "torn.png").write_bytes(b"torn")
    running = Process(
        f"--input={folder}", f"--index={tmp_path / 'index'}", "--warm-tokens=0", "--workers=1"
    )
    try:
        line = running.process.stdout.readline()
        assert line.startswith(f"3 image: {running.url} (1 skipped: "), line
        assert b"<!doctype html>" in running.get("/")
        assert json.loads(running.get("/about"))["counts"] == {"image": 3}
        fields = {"content-type": "application/x-www-form-urlencoded"}
        status, headers, found = running.post("/search", b"text=a+picture", **fields)
        assert (status, len(found["results"])) == (200, 3)
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        _, _, answer = running.post("/v1/embeddings", {"input": "a picture"})
        query = np.array(answer["data"][0]["embedding"])
        _, _, answer = running.post("/v2/embed", {"images": [uri(png(0), "image/png")]})
        cosine = float(query @ np.array(answer["embeddings"]["float"][0]))
        [first] = [one for one in found["results"] if one["label"] == "0.png"]
        assert abs(first["cosine"] - cosine) < 1e-5
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_refuses_what_is_new():
    running = Process("--warm-tokens=0", "--workers=1")
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request("GET", "/v1/models")
    connection.getresponse().read()
    with ThreadPoolExecutor(1) as pool:
        # a new shape, which takes seconds
        asked = pool.submit(running.post, "/v1/embeddings", {"input": ["a text"] * 30})
        until(lambda: 'waiting_inputs{lane="text"} 30.0' in running.get("/metrics").decode())
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        body = json.dumps({"input": "too late"})
        connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("retry-after")) == (503, "5")
        answer.read()
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        assert asked.result()[0] == 200
    _, errors = running.process.communicate(timeout=30)
    assert running.process.returncode == 0, errors
    assert "Traceback" not in errors
