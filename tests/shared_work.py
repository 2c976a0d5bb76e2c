"""What `test_processes.py` starts, alone and on two processes, to compare what comes out. Arguments: the work, and a
folder for what the first process found."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_experiments import TINY
from test_sft import CATALOG, SPLIT, TREE, make_policy
from test_trainer import VOCAB, fixed_rollouts, ours
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from worlds import EOS, PAD, tiny_model

from sapo import processes
from sapo.analysis.evaluation import evaluate_policy
from sapo.errors import InputError
from sapo.experiments import run
from sapo.runs import Job
from sapo.training.sft import SFTConfig, train_supervised
from sapo.training.trainer import SAPOTrainer

OBJECTIVES = ("sapo", "grpo", "gspo", "reinforce_plus_plus", "gdpo", "dr_grpo")


def supervised(out: Path) -> None:
    """Weights after both kinds of stages, micro-batches included."""
    policy = make_policy()
    config = SFTConfig(updates=5, batch_size=8, learning_rate=1e-2, micro_batch=2)
    train_supervised(policy, SPLIT, config, "next_item", out / f"next{processes.number()}", 0)
    train_supervised(policy, SPLIT, config, "thinking", out / f"think{processes.number()}", 0, TREE)
    if processes.is_first():
        save_file(dict(policy.model.named_parameters()), out / "weights.safetensors")


def reinforced(out: Path) -> None:
    """Weights after three updates on fixed rollouts, for several objectives."""
    tokens = {f"t{index}": index for index in range(VOCAB)}
    core = Tokenizer(models.WordLevel(tokens, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token="t1", padding_side="left"
    )
    folder = out / "stage2"
    if processes.is_first():
        tiny_model(VOCAB, scale=2.0).save_pretrained(folder)
    processes.wait()
    weights = {}
    for objective in OBJECTIVES:
        trainer = ours(
            folder,
            out / f"{objective}{processes.number()}",
            tokenizer,
            objective=objective,
            rollout_func=rollouts_of_prompts,
            per_device_train_batch_size=16 // processes.count() // 2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_steps=4,
        )
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights |= {f"{objective}/{name}": value.detach() for name, value in model.named_parameters()}
    if processes.is_first():
        save_file({name: value.clone() for name, value in weights.items()}, out / "weights.safetensors")


def rollouts_of_prompts(prompts: list[str], trainer: SAPOTrainer) -> dict[str, list]:
    """Those of `fixed_rollouts`, of each prompt alone: the same whichever process writes them."""
    size = trainer.num_generations
    parts = [fixed_rollouts(prompts[start : start + size], trainer) for start in range(0, len(prompts), size)]
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def evaluated(out: Path) -> None:
    """Metrics of a policy in small batches, which processes share."""
    policy = make_policy()
    rows = SPLIT.test
    assert len(rows)
    metrics, users = evaluate_policy(policy, SPLIT, "test", batch_size=1)
    everybody = processes.of_all((metrics, users.to_dict()))
    assert all(found == everybody[0] for found in everybody)
    if processes.is_first():
        (out / "found.json").write_text(json.dumps([metrics, users.to_dict(orient="list")]))


def broken(out: Path) -> None:
    """Weights that are no numbers, and a single batch, which one process alone reads: all say what is wrong."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(float("nan"))
    try:
        evaluate_policy(policy, SPLIT, "test")
    except FloatingPointError as error:
        (out / f"{processes.number()}.txt").write_text(str(error))
    processes.wait()


def whole(out: Path) -> None:
    """A job of all stages. The other processes write nothing under its folder."""
    target = str(out / "job")

    def watch(event: str, arguments: tuple) -> None:
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        own = "/checkpoints/" in str(arguments[0])  # where each leaves the state of its random numbers
        if (written or event == "os.mkdir") and str(arguments[0]).startswith(target) and not own:
            raise AssertionError(f"process {processes.number()}: {event} {arguments[0]}")

    if not processes.is_first():
        sys.addaudithook(watch)
    recipe = replace(
        TINY,
        seeds=(0,),
        ablations=(),
        stage1=replace(TINY.stage1, validate_every=4, patience=2),
        stage3=replace(TINY.stage3, learning_rates=(1e-3,)),
        systems=("LICD", "RecCoT blind"),
    )
    results = run(Job(recipe, target), workers=1)
    lengths = processes.of_all(len(results))
    assert lengths == [lengths[0]] * processes.count()
    assert CATALOG.num_items


def refused(out: Path) -> None:
    """What does not divide is said in words by each process."""
    for what in (lambda: processes.shares("prompts", 7, None), lambda: run(Job(TINY, str(out)), workers=2)):
        try:
            what()
        except InputError as error:
            (out / f"{processes.number()}.txt").open("a").write(f"{error}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    works = {work.__name__: work for work in (supervised, reinforced, evaluated, broken, whole, refused)}
    works[sys.argv[1]](Path(sys.argv[2]))
