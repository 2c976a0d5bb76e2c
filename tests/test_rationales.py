"""A teacher's texts: cut by sentences, read from files, asked for once each, checked for the target's name."""

import http.server
import json
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import tiny_model

from sapo.data.catalog import Catalog
from sapo.data.interactions import Rows
from sapo.errors import InputError
from sapo.policy.prompts import build_tokenizer
from sapo.training.rationales import (
    OpenAITeacher,
    RationaleTraces,
    ask_teacher,
    cut,
    local_teacher,
    read_rationales,
    teacher_prompt,
)

CATALOG = Catalog("shop", torch.tensor([[0, 0], [0, 1], [1, 0]]), ["Red Hat", "Blue Hat", "Steel Drill"])
ROWS = Rows(["u", "v", "u"], [[0, 1], [2], [0, 1]], [2, 0, 2])  # the third asks for nothing that the first does not


def test_cut_by_hand():
    text = "First. Second! Is it third? Fourth\nFifth"
    assert cut(text, 2) == ["First. Second! Is it third?", "Fourth Fifth"]  # 3 and 2
    assert cut(text, 3) == ["First. Second!", "Is it third? Fourth", "Fifth"]
    assert cut("Only one.", 3) == ["Only one.", "", ""]
    assert cut("", 2) == ["", ""]
    assert cut("v1.5 is no end. This is.", 2) == ["v1.5 is no end.", "This is."]


@given(st.integers(0, 12), st.integers(1, 5))
def test_cut_keeps_every_sentence_in_order(count, parts):
    sentences = [f"Sentence {number}." for number in range(count)]
    groups = cut(" ".join(sentences), parts)
    assert len(groups) == parts
    assert " ".join(filter(None, groups)) == " ".join(sentences)
    sizes = [group.count(".") for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_files_of_either_kind(tmp_path, suffix):
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".csv":
        path.write_text('history,target,rationale\n0 1,2,"Tools, next.\nA drill."\n2,0,Hats.\n')
    else:
        rows = [{"history": [0, 1], "target": 2, "rationale": "Tools, next.\nA drill."}]
        rows.append({"history": "2", "target": "0", "rationale": "Hats."})
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert read_rationales(path, CATALOG) == {((0, 1), 2): "Tools, next.\nA drill.", ((2,), 0): "Hats."}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"history": [0], "target": 1}', "line 1: no 'rationale'"),
        ('{"history": [0], "target": 9, "rationale": "x"}', "line 1: items are 0 to 2"),
        ('{"history": [], "target": 1, "rationale": "x"}', "at least one in a history"),
        ('{"history": ["a"], "target": 1, "rationale": "x"}', "history and target are item ids"),
        ("[1]", "line 1: no JSON object"),
        ("{", "line 1: no jsonl"),
        ("", "has no rationale"),
    ],
)
def test_bad_files_say_where(tmp_path, text, message):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rationales(tmp_path / "t.jsonl", CATALOG)
    with pytest.raises(InputError, match="is not a file"):
        read_rationales(tmp_path / "none", CATALOG)


def test_the_question_shows_titles_and_asks_for_steps():
    prompt = teacher_prompt(CATALOG, [0, 1], 2)
    assert "- Red Hat\n- Blue Hat" in prompt
    assert "Steel Drill" in prompt
    assert "in 2 steps" in prompt


def test_blocks_hold_known_words():
    traces = RationaleTraces(
        {((0,), 2): "Tools are next. A steel drill, surely."}, 3, 2, ["tools", "steel", "drill", "next"]
    )
    assert traces.of_row([0], 2) == ["tools next", "steel drill", ""]
    sentences = RationaleTraces({((0,), 2): "Tools are next. A steel drill, surely."}, 2)
    assert sentences.of_row([0], 2) == ["Tools are next.", "A steel drill, surely."]
    rows = Rows(["u", "u", "v"], [[0], [0, 1], [0]], [2, 2, 1])
    assert traces.rows(rows) == Rows(["u"], [[0]], [2])
    with pytest.raises(InputError, match="none of 1 training rows has a rationale"):
        traces.rows(rows.take([1]))
    with pytest.raises(KeyError):
        traces.of_row([1], 2)


# ------------------------------------------------------------------------------------------------------------ asking


@pytest.fixture
def server():
    """Answers with the last title it is shown; fails as often as `failures` says."""

    class Model(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"].append((body, self.headers.get("Authorization")))
            if state["failures"]:
                state["failures"] -= 1
                self.send_error(state["code"])
                return
            answer = {"choices": [{"message": {"content": f" answer {len(state['asked'])} "}}]}
            data = json.dumps(state["answer"] or answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    state = {"asked": [], "failures": 0, "code": 503, "answer": None}
    state["url"] = f"http://127.0.0.1:{running.server_address[1]}/v1"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield state
    running.shutdown()
    running.server_close()


def test_each_row_is_asked_once_and_a_stopped_run_goes_on(server, tmp_path):
    teacher, path = OpenAITeacher(server["url"], "some-model", key="secret", pause=0), tmp_path / "deep" / "t.jsonl"
    first = ask_teacher(teacher, CATALOG, ROWS.take([0]), path)
    assert first == {((0, 1), 2): "answer 1"}
    whole = ask_teacher(teacher, CATALOG, ROWS, path)
    assert whole == {((0, 1), 2): "answer 1", ((2,), 0): "answer 2"}
    assert len(server["asked"]) == 2
    body, authorization = server["asked"][0]
    assert body["model"] == "some-model"
    assert body["messages"][0]["content"] == teacher_prompt(CATALOG, [0, 1], 2)
    assert authorization == "Bearer secret"
    assert read_rationales(path, CATALOG) == whole


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server, nobody, tmp_path):
    server["failures"] = 2
    assert OpenAITeacher(server["url"], "m", pause=0)("why?") == "answer 3"
    server["failures"], server["code"] = 9, 401
    with pytest.raises(InputError, match="chat/completions: 401"):
        OpenAITeacher(server["url"], "m", pause=0)("why?")
    assert len(server["asked"]) == 4
    server["failures"] = 0
    for content, finish in ((None, "length"), ("<think> and on and on", "length"), ("", "stop")):
        server["answer"] = {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
        with pytest.raises(InputError, match=f"no answer in 1000 tokens .*{finish}"):
            OpenAITeacher(server["url"], "m", pause=0)("why?")
    server["answer"] = {"choices": [{"message": {"content": "<think>hm\n</think>\nSo."}}]}
    assert OpenAITeacher(server["url"], "m", pause=0)("why?") == "So."
    server["answer"] = {"error": "no"}
    with pytest.raises(InputError, match="an answer of another form"):
        OpenAITeacher(server["url"], "m", pause=0)("why?")
    with pytest.raises(InputError, match=r"chat/completions: .*refused"):
        OpenAITeacher(nobody, "m", pause=0, attempts=2)("why?")


@pytest.mark.parametrize("parallel", [1, 8])
def test_a_question_that_fails_stops_no_other(tmp_path, parallel):
    def teacher(prompt):
        if "- Red Hat" in prompt:
            raise InputError("the teacher is tired.")
        return "Fine."

    path = tmp_path / "t.jsonl"
    with pytest.raises(InputError, match="1 of 2 questions failed; the first: the teacher is tired"):
        ask_teacher(teacher, CATALOG, ROWS, path, parallel=parallel)
    assert read_rationales(path, CATALOG) == {((2,), 0): "Fine."}
    asked = []
    ask_teacher(lambda prompt: asked.append(prompt) or "Now.", CATALOG, ROWS, path)
    assert len(asked) == 1


def test_a_teacher_who_is_gone_is_not_asked_on_and_on(tmp_path):
    asked = []

    def gone(prompt):
        asked.append(prompt)
        time.sleep(0.01)
        raise InputError("nobody there.")

    many = Rows(["u"] * 100, [[0] * length for length in range(1, 101)], [1] * 100)
    with pytest.raises(InputError, match="nobody there"):
        ask_teacher(gone, CATALOG, many, tmp_path / "t.jsonl", parallel=2)
    assert len(asked) < 20


def test_a_torn_file_is_mended_and_another_teachers_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    ask_teacher(lambda _: "Fine.", CATALOG, ROWS, path, "one")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"history": [0')
    assert len(ask_teacher(lambda _: "Again.", CATALOG, ROWS, path, "one")) == 2
    assert path.read_bytes() == whole
    path.write_bytes(whole.rstrip())  # an editor has taken the last line end away
    more = Rows(["w"], [[1]], [0])
    ask_teacher(lambda _: "More.", CATALOG, more, path, "one")
    assert len(read_rationales(path, CATALOG)) == 3
    with pytest.raises(InputError, match="holds answers of 'one', not of 'two'"):
        ask_teacher(lambda _: "x", CATALOG, more, path, "two")
    with pytest.raises(InputError, match="kept as JSON lines"):
        ask_teacher(lambda _: "x", CATALOG, more, tmp_path / "t.csv")


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_on_this_machine(tmp_path, chat):
    words = [f"{first}{second}" for first in "bdfgklmn" for second in ("ab", "eb", "ib", "ob", "ub", "ad", "ed", "id")]
    tokenizer = build_tokenizer(CATALOG, [*words, "customer", "bought"])
    model = tiny_model(len(tokenizer))
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    teacher = local_teacher(tmp_path / "model", max_new_tokens=5)
    answers = ask_teacher(teacher, CATALOG, ROWS, tmp_path / "t.jsonl", parallel=1)
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers.values())
    assert teacher("customer bought") == teacher("customer bought")
    with pytest.raises(InputError, match="no language model"):
        local_teacher(tmp_path / "nothing")
