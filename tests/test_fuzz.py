"""Files and texts from strangers, damaged at random: what comes back is an answer or one of our own errors.

`SAPO_FUZZ=100000 pytest tests/test_fuzz.py` tries that many inputs in all; some thousands otherwise.
"""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from test_policy import CATALOG, INTERACTIONS, make_policy
from worlds import CLOSE, EOS, OPEN, PAD, layout_for

from sapo.analysis.results import read_results
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.data.readers.amazon import read_products, read_reviews
from sapo.errors import InputError
from sapo.experiments.run_folder import read_runs
from sapo.policy.ask import answer_lines
from sapo.policy.policy import Policy, recommend
from sapo.semantic_ids.tokenizer import ItemTokenizer, TokenizerConfig
from sapo.training.conversations import read_conversations
from sapo.training.rationales import read_rationales

INPUTS = int(os.environ.get("SAPO_FUZZ", "4000"))
PIECES = [
    *(b"\t", b"\n", b"\r\n", b" ", b",", b'"', b"{", b"}", b"[", b"]", b":", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf"),
    *(b"-1", b"0", b"1e999", b"NaN", b"nan", b"Infinity", b"99999999999999999999", b"1_0", b"0x1", b"+1", b"-0.5"),
    *(
        b"null",
        b"true",
        b"\\ud800",
        b"\\u0000",
        "é".encode(),
        "\u2028".encode(),
        "\u0663".encode(),
        b"sid_1",
        b"[" * 2000,
    ),
]


def damaged(seed: bytes, rng: np.random.Generator) -> bytes:
    """A few changes: bytes flipped, pieces put in, parts cut out, doubled, moved or lost at the end."""
    data = bytearray(seed)
    for _ in range(int(rng.integers(1, 5))):
        at, end = sorted(rng.integers(0, len(data) + 1, size=2).tolist())
        what = rng.integers(7)
        if what == 0 and data:
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        elif what == 1:
            data[at:at] = PIECES[int(rng.integers(len(PIECES)))]
        elif what == 2:
            data[at : min(end, at + 20)] = PIECES[int(rng.integers(len(PIECES)))]
        elif what == 3:
            del data[at : min(end, at + 30)]
        elif what == 4:
            data[at:at] = data[at : min(end, at + 200)]
        elif what == 5:
            del data[at:]
        else:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def table(name):
    def load(folder, data):
        if not (folder / "items.tsv.gz").exists() and not (folder / "items.tsv").exists():
            CATALOG.save(folder)
            INTERACTIONS.save(folder)
            (folder / f"{name}.tsv.gz").unlink()
        (folder / f"{name}.tsv").write_bytes(data)
        Catalog.load(folder)
        Interactions.load(folder).leave_one_out()

    return load


def gzipped(folder, data):
    CATALOG.save(folder)
    (folder / "items.tsv.gz").write_bytes(data)
    return Catalog.load(folder)


def file_of(read, name):
    def load(folder, data):
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return load


def of_policy(policy, name):
    def load(folder, data):
        if not (folder / "policy").exists():
            policy.save(folder / "policy")
        (folder / "policy" / name).write_bytes(data)
        return recommend(Policy.load(folder / "policy", CATALOG, "cpu"), [[0, 1]], 2, 2)

    return load


def run_manifest(folder, data):
    (folder / "runs" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "a" / "run.json").write_bytes(data)
    return read_runs(folder)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def targets(tmp_path_factory, policy):
    """What reads strangers' bytes, each with bytes that it understands."""
    folder = tmp_path_factory.mktemp("seeds")
    CATALOG.save(folder)
    INTERACTIONS.save(folder)
    plain = {name: gzip.decompress((folder / f"{name}.tsv.gz").read_bytes()) for name in ("items", "sids", "sequences")}
    found = {name: (table(name), data) for name, data in plain.items()}
    found["gzip"] = (gzipped, (folder / "items.tsv.gz").read_bytes())
    rationale = {"history": [0, 1], "target": 2, "rationale": "A tool. Of steel."}
    read = lambda path: read_rationales(path, CATALOG)  # noqa: E731
    found["rationales"] = (file_of(read, "r.jsonl"), (json.dumps(rationale) + "\n").encode() * 3)
    found["rationales of a table"] = (file_of(read, "r.csv"), b'history,target,rationale\n0 1,2,"A tool, of steel."\n')
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    found["conversations"] = (
        file_of(read_conversations, "c.jsonl"),
        f"{json.dumps({'messages': turns})}\n".encode() * 2,
    )
    review = {"reviewerID": "A1", "asin": "B000000001", "unixReviewTime": 1_400_000_000}
    found["reviews"] = (file_of(read_reviews, "r.json"), (json.dumps(review) + "\n").encode() * 4)
    found["ratings"] = (file_of(read_reviews, "r.csv"), b"A1,B000000001,5.0,1400000000\nA2,B000000001,4.0,1400000001\n")
    product = {"asin": "B1", "title": "Rake &amp; hose", "category": ["Garden", "Tools"], "description": ["long"]}
    products = lambda path: read_products(path, {"B1"})  # noqa: E731
    found["products"] = (
        file_of(products, "p.json"),
        (json.dumps(product) + "\n").encode() * 2 + repr(product).encode(),
    )
    header = "source,dataset,split,method,preset,seed,metric,value,n,run\n"
    row = "measured,synthetic,leave_one_out,sapo,quick,0,ndcg@10,0.5,100,sapo-lr\n"
    found["results"] = (file_of(read_results, "results.csv"), (header + row).encode())
    tokenizer = ItemTokenizer(TokenizerConfig("residual_kmeans", levels=(4, 4)))
    tokenizer.fit([f"item {index} of {index % 3}" for index in range(12)])
    tokenizer.save(folder / "t.safetensors")
    load = lambda path: ItemTokenizer.load(path).encode(["item 3"])  # noqa: E731
    found["tokenizer"] = (file_of(load, "t.safetensors"), (folder / "t.safetensors").read_bytes())
    policy.save(folder / "policy")
    for name in ("sapo.json", "tokenizer.json", "model.safetensors"):
        found[name] = (of_policy(policy, name), (folder / "policy" / name).read_bytes())
    run = {"method": "sapo", "status": "finished", "config": {"learning_rate": 1e-4}, "seed": 0}
    found["run"] = (run_manifest, json.dumps(run).encode())
    found["questions"] = (lambda _, data: list(answer_lines(policy, data.split(b"\n"), k=2)), b'["#1", 2]\n[0]\n')
    return found


NAMES = [
    *("items", "sids", "sequences", "gzip", "rationales", "rationales of a table", "reviews", "ratings", "products"),
    *("conversations", "results", "tokenizer", "sapo.json", "tokenizer.json", "model.safetensors", "run", "questions"),
]


SLOW = ("sapo.json", "tokenizer.json", "model.safetensors", "questions")  # each asks a policy


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_read_or_refused(name, targets, tmp_path):
    load, seed = targets[name]
    rng = np.random.default_rng(NAMES.index(name))
    share = INPUTS // len(NAMES) // (10 if name in SLOW else 1)
    load(tmp_path, seed)
    for _ in range(share):
        data = damaged(seed, rng)
        try:
            load(tmp_path, data)
        except (InputError, FloatingPointError):  # the latter is how a policy says that its weights are broken
            pass
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


def test_any_completion_is_parsed():
    layout = layout_for((3, 3, 2))
    generator = torch.Generator().manual_seed(0)
    rows = max(1000, INPUTS)
    special = torch.tensor([PAD, EOS, OPEN, OPEN, CLOSE, CLOSE, *layout.sid_ids.tolist(), 12, 13, 2**40, -5, -1])
    ids = special[torch.randint(len(special), (rows, 24), generator=generator)]
    steps, (sids, whole) = layout.token_steps(ids), layout.parse(ids)
    assert ((steps >= -1) & (steps < 3)).all()
    assert ((sids >= -1) & (sids < torch.tensor([3, 3, 2]))).all()
    assert (sids[whole] >= 0).all()


@pytest.mark.parametrize("read", [lambda path: Catalog.load(path.parent), read_reviews])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(read, tmp_path):
    """300 MB of one byte are 300 KB of gzip."""
    path = tmp_path / "items.tsv.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(300):
            file.write(b"a" * 2**20)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(InputError, match="line 1: longer than 32 MiB"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
