"""What `sapo plan` counts, against models that are built and run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import checkpoint
from test_experiments import TINY
from torch.utils.flop_counter import FlopCounterMode

from sapo import cli
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.shared_prefix import share_prompts
from sapo.errors import InputError
from sapo.experiments import measuring, recipes
from sapo.experiments.planning import (
    Lengths,
    Size,
    StagePlan,
    launch,
    measure_lengths,
    model_config,
    plan,
    plan_tokenizer,
)
from sapo.experiments.run_folder import Job
from sapo.experiments.starts import words_and_traces
from sapo.policy.backbone import Pretrained, add_item_tokens, load_pretrained
from sapo.policy.policy import Policy
from sapo.training.adapters import adapted, item_rows
from sapo.training.sft import SupervisedTrainer
from sapo.training.trainer import SAPOTrainer

KINDS = ("qwen", "llama", "gemma")
WORLD = Job(TINY, "").world
TEXTS = WORLD.catalog.titles * 3 + ["The user took these items, oldest first"] * 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(checkpoint(kind, TEXTS, tmp_path_factory.mktemp(kind))) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_operations_are_those_of_the_model(folders, kind):
    model, tokenizer = load_pretrained(Pretrained(folders[kind]))
    add_item_tokens(model, tokenizer, WORLD.catalog)
    size = Size.of(model_config(Pretrained(folders[kind])), len(tokenizer))
    assert size.parameters == model.num_parameters()
    assert size.vocabulary == len(tokenizer)
    # eager attention multiplies all pairs of a row, so that every token sees its whole row
    model.set_attn_implementation("eager")
    model.eval()
    rows, length = 3, 20
    ids = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)  # they multiply no matrices
    expected = size.reading(rows * length, rows * length, length) - 2 * rows * length * norms
    rotary = 2 * rows * length * getattr(model.config, "head_dim", 8) / 2  # angles, a product of their own
    assert forward.get_total_flops() == pytest.approx(expected, abs=3 * rotary)
    model.gradient_checkpointing_enable()
    model.train()
    with FlopCounterMode(display=False) as update:
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    learning = size.learning(rows * length, rows * length, length) - 8 * rows * length * norms
    # the last matrix of an MLP is computed again only where a norm after it needs its product, as Gemma's does
    last = 2 * rows * length * size.layers * size.width * size.mlp * (kind != "gemma")
    assert update.get_total_flops() == pytest.approx(learning - last, rel=0.003)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_cache_are_those_of_the_model(folders, kind):
    model, tokenizer = load_pretrained(Pretrained(folders[kind]))
    add_item_tokens(model, tokenizer, WORLD.catalog)
    size = Size.of(model_config(Pretrained(folders[kind])), len(tokenizer))
    share_prompts(model)
    ids = torch.randint(0, 300, (4, 9))
    cache = PromptCache(model.eval(), ids, torch.ones_like(ids))
    held = sum(states.numel() for layer in cache._shared.values() for states in layer)
    assert size.cache(ids.numel()) == 2 * held  # bytes of bfloat16
    policy = Policy(model, tokenizer, WORLD.catalog, "x", "y", 4, 5, chat=True)
    trained = adapted(policy, 3, seed=0)
    rows = len(item_rows(policy)) * size.width * (1 + (kind == "llama"))  # whose head is a table of its own
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == size.adapters(3) + rows


@pytest.mark.parametrize(("name", "body"), [("0.6B", 0.44), ("1.7B", 1.4), ("4B", 3.6)])
def test_published_models_have_the_size_they_are_said_to_have(name, body):
    config = model_config(Pretrained(f"Qwen/Qwen3-{name}"))
    size = Size.of(config, config.vocab_size)
    assert size.body / 1e9 == pytest.approx(body, abs=0.06)  # non-embedding parameters of the models' cards
    assert size.parameters / 1e9 == pytest.approx(float(name[:-1]), abs=0.1)


LENGTHS = Lengths(100, 40, 200, 80, 120, 150, 300, 1020)
SIZE = Size(body=1000, table=200, vocabulary=50, width=4, layers=2, mlp=8, keys=6, head=200, attention=4)


def test_a_plan_by_hand():
    recipe = recipes.paper(rows=2560, explained=2560, items=1000, backbone=Pretrained("x"))
    # an epoch of stage 1: (5 x 2560 + 3 x 1000) / 1024 = 15.4 updates, ten of them; of stage 2: 2.5, five of them;
    # stage 3: 2560 x 10 / 256 = 100
    first, second, third = plan(recipe, SIZE, LENGTHS, processes=4)
    assert (first.updates, second.updates, third.updates) == (150, 10, 100)
    assert first.tokens == 150 * 1024 * 100
    assert second.tokens == 10 * 1024 * 200
    assert third.tokens == 100 * 256 * (120 + 16 * 80)
    # a token's share of stage 1: 8 x (1000 + 2 x 2 x 4 x 50) and, of 40 in 100, 6 x 200
    assert first.operations == 150 * 1024 * 100 * (8 * 1800 + 0.4 * 6 * 200)
    # weights, gradients, averages, buckets and bfloat16 of 1200; 16 examples of 300 tokens: per token 2 x 4 x 4 of
    # layers, (6 x 4 + 3 x 8) x 6 of one at work, 50 x 14 of logits
    assert first.memory == second.memory == 1200 * (4 + 12 + 4 + 2) + 16 * 300 * (32 + 288 + 700)
    # and the reference's; one prompt of 150 and its 16 completions of 1020
    learning = (150 + 16 * 1020) * (32 + 288) + 16 * 1020 * 50 * 6
    writing = 8 * (150 + 16 * 1020) * 2 * 6 * 2 + 8 * 16 * 50 * 8
    assert third.memory == 1200 * (8 + 12 + 4 + 2) + max(learning, writing)
    # a fourth of 16 bytes a parameter, of 20 with the reference's, and no buckets
    assert first.in_parts == first.memory - 1200 * (16 + 4) + 1200 * 16 / 4
    assert third.in_parts == third.memory - 1200 * (20 + 4) + 1200 * 20 / 4
    # where training itself takes little, the whole model before it counts
    bare = replace(recipe, stage1=replace(recipe.stage1, batch_size=4, micro_batch=1))
    little = plan(bare, SIZE, replace(LENGTHS, longest_example=1), 4)[0]
    assert 1200 * 2 + 32 + 288 + 700 < 1200 * 4
    assert little.in_parts == 1200 * (16 / 4 + 4)


def test_more_gpus_share_what_is_read_and_adapters_need_no_reference():
    recipe = recipes.paper(rows=2560, explained=2560, items=1000, backbone=Pretrained("x"))
    alone, four = plan(recipe, SIZE, LENGTHS, 1), plan(recipe, SIZE, LENGTHS, 4)
    assert [stage.operations for stage in alone] == [stage.operations for stage in four]
    assert [b.memory - a.memory for a, b in zip(alone, four, strict=True)] == [4 * 1200] * 3
    assert {stage.in_parts for stage in alone} == {None}
    with pytest.raises(InputError, match="1024 examples an update do not divide among 3 processes"):
        plan(recipe, SIZE, LENGTHS, 3)
    small = plan(recipes.paper(2560, 2560, 1000, Pretrained("x", lora_rank=1)), SIZE, LENGTHS, 1)
    # a backward pass without gradients of weights is one of three forward passes less, of four
    assert small[0].operations == 150 * 1024 * 100 * (6 * 1800 + 0.4 * 4 * 200)
    adapters = plan(recipes.paper(2560, 2560, 1000, Pretrained("x", lora_rank=1)), SIZE, LENGTHS, 4)
    assert {stage.in_parts for stage in adapters} == {None}
    held = 12 * (1200 - SIZE.adapters(1))
    assert [a.memory - b.memory for a, b in zip(alone, small, strict=True)] == [held, held, held + 4 * 1200]


def test_lengths_are_those_of_the_examples(folders):
    start = Pretrained(folders["qwen"])
    recipe = recipes.paper(100, 50, WORLD.catalog.num_items, start)
    job = Job(recipe, "")
    tokenizer = plan_tokenizer(start, job.world)
    lengths = measure_lengths(recipe, job.world, words_and_traces(job)[1], tokenizer)
    assert lengths.longest_completion == 3 * 336 + 3 * 3 + 3
    assert lengths.stage2 == pytest.approx(lengths.prompt + lengths.stage2_learnt, rel=0.1)
    assert 0 < lengths.stage1_learnt < lengths.stage1 < lengths.longest_example
    learnt = measure_lengths(recipe, job.world, words_and_traces(job)[1], plan_tokenizer(Pretrained("a/b"), job.world))
    assert learnt.stage2_learnt > 10
    model, own = load_pretrained(start)
    add_item_tokens(model, own, job.world.catalog)
    assert len(tokenizer) == len(own)


def paper_world():
    """What `sapo run --preset paper` trains on where no data are named: rows and items do not decide it."""
    return Job(recipes.paper(2560, 2560, 512, Pretrained("x")), "").world


def test_the_command_prints_a_plan(folders, capsys):
    cli.Plan(backbone=folders["qwen"], gpus=(1, 4), tflops=100.0)()
    text = capsys.readouterr().out
    assert f"sapo run --preset paper --backbone {folders['qwen']}" in text
    model, tokenizer = load_pretrained(Pretrained(folders["qwen"]))
    add_item_tokens(model, tokenizer, paper_world().catalog)
    assert f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens" in text  # and no row that is no token's
    assert "accelerate launch --multi_gpu --num_processes 4 -m sapo.cli run --preset paper" in text
    assert "or in parts: accelerate launch --use_fsdp --fsdp_version 2" in text
    assert text.count("GiB a GPU") == 6
    assert text.count(" in parts  ") == 3
    assert text.count(" h\n") == 6
    cli.Plan(gpus=(8,), lora=16)()
    text = capsys.readouterr().out
    assert "Qwen/Qwen3-1.7B: 1,7" in text
    assert "by a tokenizer learnt from the titles" in text
    assert "--lora 16" in text
    assert "stage 1 3 times, stage 2 6 (with thinking and without) and stage 3 6 (sapo, grpo)" in text
    with pytest.raises(InputError, match=r"'\./nowhere' is no folder, and names on the hub are OWNER/NAME"):
        cli.Plan(backbone="./nowhere")()
    assert launch(["run", "--data", "my data"], 1) == "sapo run --data 'my data'"


@pytest.mark.parametrize("rank", [None, 2])
def test_measuring_runs_every_stage_at_the_sizes_of_the_recipe(folders, rank, monkeypatch):
    start = Pretrained(folders["qwen"], lora_rank=rank)
    recipe = recipes.paper(100, 50, WORLD.catalog.num_items, start)
    recipe = replace(
        recipe,
        stage1=replace(recipe.stage1, micro_batch=3, updates=100, warmup=20),
        stage2=replace(recipe.stage2, micro_batch=2),
        stage3=replace(recipe.stage3, group_size=4, rollout_prompts=2),
        block_budget=9,
    )
    job = Job(recipe, "")
    tokenizer, traces = plan_tokenizer(start, job.world), words_and_traces(job)[1]
    lengths = measure_lengths(recipe, job.world, traces, tokenizer)
    lengths = replace(lengths, stage2_learnt=lengths.longest_completion - 3 * 9 + 3 * 4)  # four words a block
    policy = measuring.random_policy(recipe, job.world, model_config(start), tokenizer, len(tokenizer))
    # a clock that runs a second for each token that is read or written, and stands still in the first update
    read, written, clock = [], [], [0.0]
    compute, sample = SupervisedTrainer.compute_loss, SAPOTrainer.sample

    def computed(self, model, inputs, **more):
        read.append(inputs["attention_mask"].sum(1).tolist())
        clock[0] += sum(read[-1]) * bool(self.state.global_step)
        return compute(self, model, inputs, **more)

    def sampled(self, prompts, size, seed):
        rollouts = sample(self, prompts, size, seed)
        written.append((len(prompts), max(map(len, prompts)), rollouts.completion_mask.sum(1).unique().tolist()))
        clock[0] += int(rollouts.completion_mask.sum()) * bool(self.state.global_step)
        return rollouts

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", computed)
    monkeypatch.setattr(SAPOTrainer, "sample", sampled)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = measuring.measure(recipe, job.world, traces, policy, lengths)
    # three updates of eight micro-batches, twice: of all lengths, then of the longest
    assert [len(rows) for rows in read] == [3] * 48 + [2] * 48
    for stage in (read[:48], read[48:]):
        assert all(rows == stage[0] for rows in stage[:24])
        assert all(rows == stage[24] for rows in stage[24:])
        assert max(stage[0]) == max(stage[24])
        assert sum(stage[0]) < sum(stage[24])
    usual, most = lengths.longest_completion - 3 * 9 + 3 * 4, lengths.longest_completion
    assert [(count, tokens) for count, _, tokens in written] == [(2, [usual])] * 3 + [(2, [most])] * 3
    assert written[3][1] >= max(longest for _, longest, _ in written[:3])
    assert list(found) == ["1", "2", "3"]
    assert found["1"].seconds == pytest.approx(lengths.stage1)
    assert found["2"].seconds == pytest.approx(lengths.stage2)
    assert found["3"].seconds == pytest.approx(4 * usual)
    assert {one.memory for one in found.values()} == {None}


def test_too_little_memory_is_said(folders, monkeypatch):
    class Full:
        def add_callback(self, watch):
            pass

        def train(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match="too little memory for that plan"):
        measuring._run(Full(), torch.device("cpu"))


def test_what_was_measured_is_said_beside_the_plan():
    planned = StagePlan("3", 10, 20, 0, 0, memory=9 * 2**30, in_parts=None)
    assert measuring.Measured(2.5, None).describe(planned) == "stage 3: 2.5 s a prompt with its completions"
    text = measuring.Measured(0.25, 10 * 2**30).describe(replace(planned, name="1"))
    assert text == "stage 1: 0.25 s an example; 10.0 GiB, by the formula 9.0 (-10%)"


def test_the_command_makes_times_of_what_was_measured(folders, capsys, monkeypatch):
    """A tenth of a second an example or prompt: hours by hand."""
    found = dict.fromkeys("123", measuring.Measured(0.1, None))
    monkeypatch.setattr(measuring, "measure", lambda *unused: found)
    cli.Plan(backbone=folders["qwen"], gpus=(1, 2), measure=True)()
    text = capsys.readouterr().out
    world = paper_world()
    rows, items = len(world.split.train), world.catalog.num_items
    units = [10 * ((5 * rows + 3 * items) // 1024) * 1024, 5 * (rows // 1024) * 1024, 10 * rows // 256 * 256]
    for stage, unit, count in zip("123", ("an example", "an example", "a prompt"), units, strict=True):
        (line,) = (line for line in text.splitlines() if line.startswith(f"  stage {stage}: 0.1 s {unit}"))
        hours = count * 0.1 / 3600
        assert line.endswith(f": {hours:.1f} h on 1, {hours / 2:.1f} h on 2")
