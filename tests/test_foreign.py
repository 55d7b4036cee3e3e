"""Templates and patterns of others: as transformers and re have them, and never for long."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lco_jax import LcoError
from lco_jax.checkpoint import builtin
from lco_jax.data import foreign
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer, as_messages

CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "A <cat> & é\n"}, {"type": "image", "x": None}],
    },
]
TEXT = "{{ messages[-1].content[0].text }}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set ns = namespace(x='x') %}{% for i in range(60) %}GROW{% endfor %}{{ ns.x }}"
# tuples in tuples, of which the innermost is hashed with a frame of C for each
NESTED = (
    "{% set ns = namespace(x=()) %}{% for i in range(5) %}{% for j in range(30000) %}"
    "{% set ns.x = (ns.x,) %}{% endfor %}{% endfor %}{{ {ns.x: 1} }}"
)


@pytest.fixture
def folder(cache, tmp_path):
    return shutil.copytree(builtin.find("builtin:tiny"), tmp_path / "model")


def with_template(folder, template):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def refused(folder, template):
    """The sentence with which a template is refused when it is loaded."""
    with pytest.raises(LcoError) as error:
        ChatTokenizer(with_template(folder, template))
    assert "\n" not in str(error.value)
    assert str(folder / "chat_template.json") in str(error.value)
    return str(error.value)


# ---- what is right


@pytest.mark.parametrize(
    "template",
    [
        "  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n{{ messages|tojson }}",
        "{{ messages|tojson(indent=2, sort_keys=True) }}{{ {'é': '<'}|tojson(ensure_ascii=True) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
        "{% generation %}{% set x = 3 %}{{ x }}{% endgeneration %}{{ x is defined }}",
        "{% set ns = namespace(a=1, b=[]) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b }}",
        "{{ dict(a=1, b='x') }}{{ dict.fromkeys(['k'], 2) }}",
        "{{ bos_token }}|{{ tools }}|{{ documents is none }}|{{ add_generation_prompt }}",
        "{% macro f(x) %}[{{ x|trim|upper }}]{% endmacro %}{{ f(messages[1].content[0].text) }}",
        "{{ messages[1].content[0].text.split('&')[::-1]|join('~') }}{{ absent }}",
        "{{ messages[1].content[1] }}{{ messages[1].content|length }}",
        TEXT,
    ],
)
def test_a_template_renders_as_in_transformers(template):
    settings = {"bos_token": "<s>", "add_generation_prompt": True}
    want, _ = render_jinja_template([CHAT], chat_template=template, **settings)
    assert foreign.render(template, [CHAT], settings, "it") == want


def test_the_time_is_that_of_now():
    (year,) = foreign.render("{{ strftime_now('%Y') }}", [CHAT], {}, "it")
    assert re.fullmatch("20[0-9]{2}", year)


def test_messages_that_a_template_does_not_take_are_errors_of_their_own(folder):
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + TEXT
    processor = Processor(with_template(folder, template))
    good, bad = as_messages("a", "", ""), [*as_messages("a", "", ""), *as_messages("b", "", "")]
    first, second, third = processor.attempt([good, bad, good], ["x", "y", "z"])
    assert first.input_ids.tolist() == third.input_ids.tolist()
    assert str(second).startswith("y: the chat template of ")
    assert str(second).endswith("does not take these messages: one turn")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_chats_are_rendered_in_their_order(count):
    chats = [as_messages(f"text {i}", "", "") for i in range(count)]
    found = foreign.render(TEXT, chats, {}, "it")
    assert found == [f"text {i}" for i in range(count)]


# ---- what is hostile


@pytest.mark.parametrize(
    "template",
    [
        "",
        " \n",
        "always the same",
        "{{ messages[0].role }}",
        "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}",
        "{{ messages[0].content[0].text[:5] }}",
    ],
)
def test_a_template_that_leaves_out_the_text_is_refused(folder, template):
    assert refused(folder, template).endswith("leaves out what a user says")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth exceeded"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ absent.more }}", "'absent' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__a=1) %}", "__a"),
        ("{{ messages[0].content[9].text }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 9**9999 }}", "Exceeds the limit"),
        ("{% include 'x' %}", "no loader"),
        (TEXT + "{{ 'x' * 3000000 }}", "it makes 30000"),
        ("\ud800", "half of a surrogate pair"),
    ],
)
def test_a_template_that_fails_says_why(folder, template, reason):
    assert reason in refused(folder, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ range(10**5)|list * 10**6 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'x'|center(10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'|indent(10**10) }}",
        "{{ [1]|batch(10**9, 0)|list }}",
        "{{ {'a': 1}|tojson(indent=10**10) }}",
        GROWS.replace("GROW", "{% set ns.x = ns.x ~ ns.x %}"),
        GROWS.replace("GROW", "{% set ns.x = ns.x + ns.x %}"),
        GROWS.replace("GROW", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    ],
)
def test_a_template_that_wants_gigabytes_is_refused(folder, template):
    assert "needs more than 256 MiB of memory" in refused(folder, template)


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 10**(10**8) }}",
        "{{ 1.5|round(10**8, 'ceil') }}",
        "{{ lipsum(10**8) }}",
        "{% for i in range(9999) %}" * 4 + "{% endfor %}" * 4,
    ],
)
def test_a_template_that_takes_for_ever_is_ended(folder, template, monkeypatch):
    """Also where one instruction takes so long, which nothing in the same process can end."""
    monkeypatch.setattr(foreign, "SECONDS", 0.3)
    assert "did not end within 0.3 s of CPU time" in refused(folder, template)


def test_a_template_that_kills_its_process_is_refused(folder):
    assert "ended the process that it ran in, by SIGSEGV" in refused(folder, NESTED)


@pytest.mark.parametrize(
    "what", ["{{ 'x' * (messages|length * 10**10) }}", "{{ 10**(messages|length * 10**8) }}"]
)
def test_a_template_may_be_hostile_to_some_texts_alone(folder, what, monkeypatch):
    """It is the checkpoint that is refused, and no input that is skipped."""
    template = TEXT + "{% if 'bad' in messages[0].content[0].text %}WHAT{% endif %}"
    processor = Processor(with_template(folder, template.replace("WHAT", what)))
    monkeypatch.setattr(foreign, "SECONDS", 0.3)
    chats = [as_messages(text, "", "") for text in ("good", "bad")]
    assert len(processor(chats[:1])) == 1
    with pytest.raises(LcoError, match=r"^the chat template of .*, and was ended"):
        processor.attempt(chats, ["x", "y"])
    assert len(processor(chats[:1])) == 1


def test_a_text_of_which_no_token_is_left_is_an_error(folder):
    processor = Processor(with_template(folder, TEXT))
    with pytest.raises(LcoError, match=r"^input 1: .* leave no token"):
        processor([as_messages(text, "", "") for text in ("a", "")])


# ---- patterns


@pytest.mark.parametrize("pattern", ["a+b?", "(?i)AB", "x|ab", ".*", "", r"(.*\.)?(ab)"])
def test_patterns_match_as_in_re(pattern):
    names = ["ab", "a", "x", "", "model.ab", "ab\n"]
    want = [[0] if re.fullmatch(pattern, name) else [] for name in names]
    assert foreign.matching([pattern], names, "it") == want


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000, "(?P<a"])
def test_what_is_no_pattern_is_named(pattern):
    with pytest.raises(LcoError, match=r"^r.json: r has '.*, which is not a regular expression: "):
        foreign.matching([pattern], ["ab"], "r.json: r")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+b", "(.*)*b", r"(\w+\s?)*!"])
def test_a_pattern_that_takes_for_ever_is_ended(pattern, monkeypatch):
    monkeypatch.setattr(foreign, "SECONDS", 0.3)
    with pytest.raises(LcoError, match=r"^r.json: r did not end within 0\.3 s"):
        foreign.matching([pattern], ["a" * 60 + "!?"], "r.json: r")
    assert foreign.matching(["a+"], ["aa"], "it") == [[0]]


# ---- the process


def process():
    foreign.matching(["a"], ["a"], "it")
    return foreign._process.popen


def test_a_process_that_ended_while_it_waited_blames_nobody():
    waits = process()
    waits.kill()
    waits.wait()
    assert foreign.matching(["a"], ["a"], "it") == [[0]]


def test_threads_share_the_process():
    first = process()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: foreign.matching([f"{i}"], ["7"], "it"), range(200))
    assert [i for i, one in enumerate(found) if one == [[0]]] == [7]
    assert process() is first


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child asks nothing of jax
def test_a_fork_has_its_own_process():
    ours = process().pid
    child = os.fork()
    if child == 0:
        os._exit(0 if process().pid != ours else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert process().pid == ours


def test_it_ends_with_its_parent():
    """Also where that is killed, and a fork of it still has the pipe."""
    code = """
import os, signal, time
from lco_jax.data import foreign
foreign.matching(["a"], ["a"], "it")
if os.fork() == 0:
    os.close(1)
    time.sleep(20)
    os._exit(0)
print(foreign._process.popen.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        (sys.executable, "-c", code), stdout=subprocess.PIPE, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("it is still there")
