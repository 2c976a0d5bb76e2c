"""Conversations that stage 1 of pretrained models reads too."""

import json

import pytest
from test_pretrained import CATALOG, SPLIT, folders, make, pieces  # noqa: F401

from sapo.errors import InputError
from sapo.training.conversations import Conversation, read_conversations
from sapo.training.examples import ChatExamples
from sapo.training.traces import NodeDescriptors

ASKED = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": "<think>\nTwo twos.\n</think>\n\n4"}


def write(path, *records):
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def test_the_last_answer_is_learnt(tmp_path):
    more = [SYSTEM, ASKED, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}, SAID]
    path = write(tmp_path / "c.jsonl", {"messages": [ASKED, SAID], "source": "x"}, "", {"messages": more})
    assert read_conversations(path) == [
        Conversation([ASKED], SAID["content"]),
        Conversation(more[:-1], SAID["content"]),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([ASKED, SAID], "'messages' is a list of two turns or more"),
        ({"messages": [SAID]}, "'messages' is a list of two turns or more"),
        ({"messages": [ASKED, ASKED]}, "the last turn is what is learnt"),
        ({"messages": [ASKED, {**SAID, "content": " "}]}, "the last turn is what is learnt"),
        ({"messages": [{"role": "tool", "content": "x"}, SAID]}, "a turn has a role"),
        ({"messages": [{"role": "user", "content": None}, SAID]}, "a turn has a role .* and a content of text"),
        ({"messages": ["hello", SAID]}, "a turn has a role"),
    ],
)
def test_what_is_no_conversation_is_named_by_its_line(record, message, tmp_path):
    path = write(tmp_path / "c.jsonl", {"messages": [ASKED, SAID]}, record)
    with pytest.raises(InputError, match=rf"c\.jsonl, line 2: {message}"):
        read_conversations(path)


def test_no_file_and_no_line_are_said(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="has no conversation"):
        read_conversations(write(tmp_path / "c.jsonl", ""))


def test_they_are_one_more_stream_of_stage_1(make):  # noqa: F811
    policy = make("qwen")
    said = [Conversation([SYSTEM, ASKED], SAID["content"]), Conversation([ASKED], "Four.")]
    total = 27 + len(said)  # five streams of three rows, three of four items
    data = ChatExamples(policy, SPLIT, "next_item", total, 0, conversations=said)
    without = ChatExamples(policy, SPLIT, "next_item", 27, 0)
    seen = {pieces(policy, data[index]) for index in range(total)}
    new = seen - {pieces(policy, without[index]) for index in range(27)}
    end = policy.tokenizer.eos_token
    assert new == {
        (policy.wording.reply_to([SYSTEM, ASKED]), SAID["content"] + end),
        (policy.wording.reply_to([ASKED]), f"Four.{end}"),
    }
    prompt = policy.wording.reply_to([SYSTEM, ASKED])
    assert prompt == policy.tokenizer.apply_chat_template([SYSTEM, ASKED], tokenize=False, add_generation_prompt=True)
    thinking = ChatExamples(policy, SPLIT, "thinking", 3, 0, NodeDescriptors(CATALOG, 2), conversations=said)
    assert all("2 + 2" not in "".join(pieces(policy, thinking[index])) for index in range(3))


def test_long_ones_keep_three_thousand_tokens(make):  # noqa: F811
    policy = make("qwen")
    said = [Conversation([{"role": "user", "content": "steel " * 5000}], "4")]
    data = ChatExamples(policy, SPLIT, "next_item", 28, 0, conversations=said)
    assert max(len(data[index]["input_ids"]) for index in range(28)) == 3072


def test_templates_without_a_system_turn_get_it_in_the_question(make):  # noqa: F811
    wording = make("gemma").wording
    assert wording.reply_to([SYSTEM, ASKED]) == wording.reply_to(
        [{"role": "user", "content": "Be brief.\n\nWhat is 2 + 2?"}]
    )
    assert "Be brief." in wording.reply_to([SYSTEM, ASKED])
    with pytest.raises(InputError, match="chat template refuses turns of system, system"):
        wording.reply_to([SYSTEM, SYSTEM])


def test_a_tokenizer_without_a_template_writes_plain_turns(make):  # noqa: F811
    policy = make("qwen")
    policy.tokenizer.chat_template = None
    assert policy.wording.reply_to([SYSTEM, ASKED]).endswith("System: Be brief.\n\nUser: What is 2 + 2?\n\nAnswer:\n")
