"""Chat templates: equal to transformers' rendering, and harmless whatever the template does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest

from edgemoe.chat import MAX_SOURCE, ChatTemplate
from edgemoe.errors import CheckpointError, EdgeMoEError, UsageError

USER = [{"role": "user", "content": "Tell me a story."}]
TALK = [
    {"role": "system", "content": "You are brief.\n"},
    {"role": "user", "content": "  Größe? <b>\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTall."},
    {"role": "user", "content": "And 'wide'?"},
]

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

OLMOE = (
    "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}\n{% elif message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}\n"
    "{% elif message['role'] == 'assistant' %}\n{% if not loop.last %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}\n{% else %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\\n' }}\n{% endif %}\n"
    "{% endfor %}"
)

# The parts of Qwen3's template that text conversations reach.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{ tools | tojson }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501

MIXED = """{% macro turn(role, text='') %}[{{ role|upper }}]{{ caller() if caller else text }}
{% endmacro %}
{%- if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}
{% for m in messages if m.role != 'system' %}
  {% if loop.index > 3 %}{% break %}{% endif %}
{% generation %}{{ turn(m.role, m.content | trim) }}{% endgeneration %}
{% endfor %}
{% call turn('x') %}inner{% endcall %}
{% set both %}{{ messages|map(attribute='role')|join('+') }}{% endset %}{{ both }}
{{ {'a': 'é<', 'n': [1, 2.5, none, true]} | tojson }} {{ messages[-1] | tojson(indent=2) }}
{{ 'a' ~ 1 ~ none ~ missing }} {{ (1, 2) }} {{ [1, 'x'] }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 7 % 4 }}
{{ '%s=%d' % ('k', 3) }} {{ '{:>5}|{}'.format('r', 1) }} {{ 'ab' * 3 }} {{ [1] + [2] }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ range(4)|list }}
{{ dict(a=1)['a'] }} {{ 'x' if 'user' in messages|map(attribute='role') else 'y' }}
{{ bos_token }}{{ eos_token }}{% for k, v in {'p': 1}.items() %}{{ k }}{{ v }}{% endfor %}
"""


def oracle(source: str, messages: list[dict[str, Any]], add: bool, **tokens: str) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    texts, _ = utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add, **tokens
    )
    return str(texts[0])


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("messages", [USER, TALK], ids=["one", "four"])
@pytest.mark.parametrize(
    "source", [CHATML, OLMOE, QWEN3, MIXED], ids=["chatml", "olmoe", "q3", "mix"]
)
def test_renders_as_transformers(source: str, messages: list[dict[str, Any]], add: bool) -> None:
    ours = ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt=add)
    assert ours == oracle(source, messages, add, bos_token="<s>", eos_token="</s>")
    assert messages[0]["content"].strip() in ours or messages[0]["role"] == "system"


def test_absent_tokens_are_empty_not_none() -> None:
    assert ChatTemplate("{{ bos_token }}|{{ eos_token }}").render(USER) == "|"


def test_clock() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(USER)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def test_refusal_is_the_callers_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(UsageError, match=r"refuses this conversation: roles must alternate$"):
        template.render(USER)


def test_long_conversations_render() -> None:
    """The limits grow with the conversation: 2,000 turns of 1,000 characters are fine."""
    talk = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": "x" * 1000} for i in range(2000)
    ]
    text = ChatTemplate(QWEN3).render(talk)
    assert text.count("<|im_start|>user\n") == 1000 and len(text) > 2_000_000
    growing = "{% set ns = namespace(t='') %}{% for m in messages %}" + (
        "{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}"
    )
    assert ChatTemplate(growing).render(talk[:100]) == "x" * 100_000


def nested(step: str, start: str = "[1]", end: str = "{{ ns.x }}") -> str:
    return (
        "{% set ns = namespace(x=" + start + ") %}{% for i in range(64) %}{% set ns.x = "
        + step + " %}{% endfor %}" + end
    )  # fmt: skip


def namespaces() -> str:
    links = "".join(
        "{% set n" + str(i + 1) + " = namespace() %}"
        + "".join("{% set n" + f"{i + 1}.{a} = n{i}" + " %}" for a in "ab")
        for i in range(64)
    )  # fmt: skip
    return "{% set n0 = namespace() %}" + links + "{{ n64 }}"


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop tests": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "comparisons": "{% set a = range(99999)|list %}{% set b = range(99999)|list %}"
    "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "doubling +": nested("ns.x + ns.x", "'a'", ""),
    "doubling ~": nested("ns.x ~ ns.x", "'a'", ""),
    "doubling list": nested("[ns.x, ns.x]"),
    "doubling tuple": nested("(ns.x, ns.x)"),
    "doubling dict": nested("{'a': ns.x, 'b': ns.x}", end="{{ ns.x|tojson }}"),
    "doubling dict()": nested("dict(a=ns.x, b=ns.x)"),
    "doubling set block": "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 64,
    "doubling namespaces": namespaces(),
    "namespace cycle": "{% set a = namespace() %}{% set a.x = [a, a] %}{{ a }}",
    "string *": "{{ 'a' * 10000000000 }}",
    "list *": "{{ 1000000000 * [1] }}",
    "power": "{{ 2 ** (10 ** 10) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000)|length }}",
    "expandtabs": "{{ 'a\t'.expandtabs(1000000000)|length }}",
    "to_bytes": "{{ (5).to_bytes(1000000000, 'big')|length }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "tojson indent": "{{ [1]|tojson(indent=1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "percent width": "{{ '%999999999d' % 3 }}",
    "percent star": "{{ '%*d' % (999999999, 3) }}",
    "format filter": "{{ '%999999999d'|format(3) }}",
    "format width": "{{ '{:>999999999}'.format(3) }}",
    "format nested": "{{ '{:>{}}'.format(3, 999999999) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "strftime width": "{{ strftime_now('%999999999Y')|length }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999})|length }}",
    "wordwrap": "{{ ('a' * 99999)|wordwrap(1, wrapstring='b' * 99999)|length }}",
    "join lazy": "{{ range(99999)|join('b' * 99999) }}",
    "join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "map": "{{ range(99999)|map('center', 99999)|list|length }}",
    "sum": "{% set a = range(99999)|list %}{{ ([a] * 1000)|sum(start=[])|length }}",
    "list of string": "{{ ('a' * 30000000)|list|length }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_and_huge_are_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="does not end, or makes too much text") as caught:
        ChatTemplate(source).render(USER)
    assert time.monotonic() - start < 15  # a second or two; the machine may be busy
    assert "\n" not in str(caught.value)


def test_memory_of_a_hostile_template_is_bounded() -> None:
    code = (
        "import resource, sys; from edgemoe.chat import ChatTemplate\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ChatTemplate('{{ messages }}').render([]); before = peak()\n"
        "for source in sys.argv[1:]:\n"
        "    try: ChatTemplate(source).render([])\n"
        "    except Exception: pass\n"
        "print((peak() - before) // 1024)"
    )
    names = ["doubling +", "doubling ~", "join lazy", "map", "doubling list", "doubling set block"]
    run = subprocess.run(
        [sys.executable, "-c", code, *(ENDLESS[n] for n in names)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 128  # MiB; one unbounded doubling alone takes gigabytes


ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "mutate": "{{ messages.append(1) }}",
    "mutate by attr": "{{ (messages|attr('append'))(1) }}",
    "namespace": "{{ namespace(__init__=1) }}",
    "namespace set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "lipsum": "{{ lipsum(100000) }}",
    "range": "{{ range(10 ** 12)|list }}",
    "bad call": "{{ 3() }}",
    "bad filter": "{{ 3|nofilter }}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_escapes_and_failures_are_one_line_errors(source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source).render(USER)
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)
    assert USER == [{"role": "user", "content": "Tell me a story."}]


@pytest.mark.parametrize("source", ["{{ f.__globals__ }}", "{{ raise_exception.__globals__ }}"])
def test_internals_are_undefined(source: str) -> None:
    assert ChatTemplate(source.replace("f.", "strftime_now.")).render(USER) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% if x %}",
        "{{ 'a }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (MAX_SOURCE + 1),
    ],
)
def test_what_is_no_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^chat template"):
        ChatTemplate(source)


def test_messages_must_be_plain_data() -> None:
    with pytest.raises(UsageError, match="plain JSON"):
        ChatTemplate("{{ messages }}").render([{"role": object()}])


def test_a_stopped_template_renders_the_next_conversation() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for a in range(m.n) %}{% for b in range(m.n) %}x{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(CheckpointError):
        template.render([{"n": 99999}])
    assert template.render([{"n": 2}]) == "xxxx"


def test_where_a_checkpoint_keeps_its_template() -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": "config {{ bos_token }}{{ eos_token }}",
    }

    def text(jinja: bytes | None, settings: dict[str, Any] | None) -> str:
        template = ChatTemplate.from_files(jinja, settings)
        assert template is not None
        return template.render(USER)

    assert text(None, config) == "config <s></s>"
    assert text(b"file {{ eos_token }}", config) == "file </s>"
    assert text(b"file", None) == "file"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert text(None, {"chat_template": named}) == "D"
    assert ChatTemplate.from_files(None, None) is None
    assert ChatTemplate.from_files(None, {"chat_template": None}) is None
    for broken in ({"chat_template": 3}, {"chat_template": {"default": "x"}}):
        with pytest.raises(EdgeMoEError, match="chat_template is not a string"):
            ChatTemplate.from_files(None, broken)
    with pytest.raises(CheckpointError, match="not UTF-8"):
        ChatTemplate.from_files(b"\xff", None)
