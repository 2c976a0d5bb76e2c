"""What `test_processes.py` starts, alone and on two processes, to compare what comes out. Arguments: the work, a folder
for what the first process found, and "sharded" where each process shall hold a part of the weights."""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from test_experiments import TINY
from test_sft import CATALOG, SPLIT, TREE, make_policy
from test_trainer import VOCAB, fixed_rollouts, ours
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerState
from worlds import EOS, PAD, tiny_model

from sapo.common import distributed
from sapo.errors import InputError
from sapo.evaluation.evaluate import evaluate_policy
from sapo.experiments.run_folder import Job
from sapo.experiments.runner import run
from sapo.training import sft
from sapo.training.adapters import rows_alone
from sapo.training.sft import SFTConfig, train_supervised
from sapo.training.sharding import gathered, prepare_sharding, whole_weights
from sapo.training.trainer import SAPOTrainer

OBJECTIVES = ("sapo", "grpo", "gspo", "reinforce_plus_plus", "gdpo", "dr_grpo")


def supervised(out: Path) -> None:
    """Weights after both kinds of stages, micro-batches included."""
    policy = make_policy()
    config = SFTConfig(updates=5, batch_size=8, learning_rate=1e-2, micro_batch=2, validate_every=2)
    split = replace(SPLIT, valid=SPLIT.valid.take([0, 1, 0]))  # the two do not read equally often
    log = train_supervised(policy, split, config, "next_item", out / "next", 0)
    looks = torch.tensor([entry["eval_loss"] for entry in log if "eval_loss" in entry])
    config = replace(config, validate_every=None)
    train_supervised(policy, SPLIT, config, "thinking", out / "think", 0, TREE)
    if distributed.is_first():
        save_file(dict(policy.model.named_parameters()) | {"looks": looks}, out / "weights.safetensors")


def reinforced(out: Path) -> None:
    """Weights after three updates on fixed rollouts, for several objectives."""
    tokenizer = trainer_tokenizer()
    folder = out / "stage2"
    if distributed.is_first():
        tiny_model(VOCAB, scale=2.0).save_pretrained(folder)
    distributed.wait()
    weights = {}
    for objective in OBJECTIVES:
        trainer = ours(
            folder,
            out / objective,
            tokenizer,
            objective=objective,
            rollout_func=rollouts_of_prompts,
            per_device_train_batch_size=16 // distributed.count() // 2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_steps=4,
        )
        trainer.train()
        model = gathered(trainer.accelerator.unwrap_model(trainer.model))
        weights |= {f"{objective}/{name}": value.detach() for name, value in model.named_parameters()}
    if distributed.is_first():
        save_file({name: value.clone() for name, value in weights.items()}, out / "weights.safetensors")


def trainer_tokenizer() -> PreTrainedTokenizerFast:
    """The one of `test_trainer.py`."""
    tokens = {f"t{index}": index for index in range(VOCAB)}
    core = Tokenizer(models.WordLevel(tokens, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token="t1", padding_side="left"
    )


def rollouts_of_prompts(prompts: list[str], trainer: SAPOTrainer) -> dict[str, list]:
    """Those of `fixed_rollouts`, of each prompt alone: the same whichever process writes them."""
    size = trainer.num_generations
    parts = [fixed_rollouts(prompts[start : start + size], trainer) for start in range(0, len(prompts), size)]
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


class Stop(TrainerCallback):
    """Ends training after update 5."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **unused: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def resumed(out: Path) -> None:
    """Both kinds of training, stopped after update 5 and taken up at update 4."""
    config = SFTConfig(updates=8, batch_size=4, learning_rate=1e-2)
    policy, callback = make_policy(), sft.StopAtNonFiniteLoss
    if stops := distributed.count() > 1:
        sft.StopAtNonFiniteLoss = Stop  # type: ignore[misc, assignment]
        with suppress(KeyboardInterrupt):
            train_supervised(policy, SPLIT, config, "next_item", out / "supervised", 0)
        sft.StopAtNonFiniteLoss, policy = callback, make_policy()  # type: ignore[misc]
        distributed.wait()
    train_supervised(policy, SPLIT, config, "next_item", out / "supervised", 0, resume=stops)
    weights = {f"supervised/{name}": value.detach() for name, value in policy.model.named_parameters()}
    tokenizer, folder = trainer_tokenizer(), out / "stage2"
    if distributed.is_first():
        tiny_model(VOCAB, scale=2.0).save_pretrained(folder)
    distributed.wait()

    def make() -> SAPOTrainer:
        size = 16 // distributed.count()
        settings = {"per_device_train_batch_size": size, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
        return ours(folder, out / "reinforced", tokenizer, rollout_func=rollouts_of_prompts, **settings)

    if stops:
        stopped = make()
        stopped.add_callback(Stop)
        with suppress(KeyboardInterrupt):
            stopped.train()
        distributed.wait()
    trainer = make()
    trainer.train(resume_from_checkpoint=stops)
    model = gathered(trainer.accelerator.unwrap_model(trainer.model))
    weights |= {f"reinforced/{name}": value.detach() for name, value in model.named_parameters()}
    if distributed.is_first():
        save_file({name: value.clone() for name, value in weights.items()}, out / "weights.safetensors")


def sampled(out: Path) -> None:
    """Completions written from whole weights, of unequal length on each process, and from the same weights in parts."""
    tokenizer, folder = trainer_tokenizer(), out / "stage2"
    if distributed.is_first():
        tiny_model(VOCAB, scale=2.0).save_pretrained(folder)
    distributed.wait()
    trainer = ours(folder, out / "run", tokenizer, rollout_func=None, per_device_train_batch_size=8, max_steps=1)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    held = sum(value.to_local().numel() for value in model.parameters())
    plain = gathered(model)
    rows = trainer.train_dataset["prompt"][: 1 + distributed.number()]
    ids = trainer.processing_class(rows, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        expected = plain(**ids).logits
        together = model(**ids).logits
        with whole_weights(model):
            for _ in range(1 + 2 * distributed.number()):
                alone = model(**ids).logits
        again = model(**ids).logits
    apart = [float((found - expected).abs().max()) for found in (together, alone, again)]
    share = held / sum(value.numel() for value in plain.parameters())
    found = distributed.of_all({"apart": apart, "share": share, "class": type(plain).__name__})
    if distributed.is_first():
        (out / "found.json").write_text(json.dumps(found))


def rolled(out: Path) -> None:
    """Weights after updates on completions that the processes write themselves, not equally often under dapo."""
    tokenizer, folder = trainer_tokenizer(), out / "stage2"
    if distributed.is_first():
        tiny_model(VOCAB, scale=2.0).save_pretrained(folder)
    distributed.wait()
    weights = {}
    for objective in ("sapo", "dapo", "best_of_beam"):
        settings = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
        }
        trainer = ours(
            folder, out / objective, tokenizer, objective=objective, rollout_func=None, reward_beams=2, **settings
        )
        trainer.train()
        assert any(row.get("grad_norm") for row in trainer.state.log_history)
        model = gathered(trainer.accelerator.unwrap_model(trainer.model))
        weights |= {f"{objective}/{name}": value.detach().clone() for name, value in model.named_parameters()}
    if distributed.is_first():
        save_file(weights, out / "weights.safetensors")


def evaluated(out: Path) -> None:
    """Metrics of a policy in small batches, which processes share."""
    policy = make_policy()
    rows = SPLIT.test
    assert len(rows)
    metrics, users = evaluate_policy(policy, SPLIT, "test", batch_size=1)
    everybody = distributed.of_all((metrics, users.to_dict()))
    assert all(found == everybody[0] for found in everybody)
    if distributed.is_first():
        (out / "found.json").write_text(json.dumps([metrics, users.to_dict(orient="list")]))


def broken(out: Path) -> None:
    """Weights that are no numbers, and a single batch, which one process alone reads: all say what is wrong."""
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(float("nan"))
    try:
        evaluate_policy(policy, SPLIT, "test")
    except FloatingPointError as error:
        (out / f"{distributed.number()}.txt").write_text(str(error))
    distributed.wait()


def whole(out: Path) -> None:
    """A job of all stages. The other processes write nothing under its folder."""
    target = str(out / "job")

    def watch(event: str, arguments: tuple) -> None:
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        own = "/checkpoints/" in str(arguments[0])  # where each leaves the state of its random numbers
        if (written or event == "os.mkdir") and str(arguments[0]).startswith(target) and not own:
            raise AssertionError(f"process {distributed.number()}: {event} {arguments[0]}")

    if not distributed.is_first():
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
    lengths = distributed.of_all(len(results))
    assert lengths == [lengths[0]] * distributed.count()
    assert CATALOG.num_items


def refused(out: Path) -> None:
    """What does not divide is said in words by each process."""
    for what in (lambda: distributed.shares("prompts", 7, None), lambda: run(Job(TINY, str(out)), workers=2)):
        try:
            what()
        except InputError as error:
            (out / f"{distributed.number()}.txt").open("a").write(f"{error}\n")


def unknown(out: Path) -> None:
    """Ways to spread weights that are refused."""
    distributed.wait()
    accelerator = Accelerator()
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    prepare_sharding(accelerator)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert accelerator.gradient_state.plugin_kwargs["sync_each_batch"]
    plugin.mixed_precision_policy = None
    said = []
    for name, value in (
        ("fsdp_version", 1),
        ("state_dict_type", StateDictType.SHARDED_STATE_DICT),
        ("cpu_ram_efficient_loading", True),
        ("reshard_after_forward", False),
    ):
        before = getattr(plugin, name)
        setattr(plugin, name, value)
        with pytest.raises(InputError) as error:
            prepare_sharding(accelerator)
        setattr(plugin, name, before)
        said.append(str(error.value))
    with pytest.raises(InputError, match="adapters need the whole model on each GPU: launch with DDP"):
        train_supervised(make_policy(), SPLIT, SFTConfig(2, batch_size=4), "next_item", out, 0, lora_rank=2)
    policy = make_policy()
    with rows_alone(policy.model, [0]), pytest.raises(InputError, match="rows that are trained alone need the whole"):
        train_supervised(policy, SPLIT, SFTConfig(2, batch_size=4), "next_item", out, 0)
    folder = out / "stage2"
    if distributed.is_first():
        tiny_model(VOCAB).save_pretrained(folder)
    distributed.wait()
    for objective, settings, need in (
        ("sapo", {"lora_rank": 2}, "adapters"),
        ("rlvr", {}, "the values of objective 'rlvr'"),
    ):
        with pytest.raises(InputError, match=f"{need} need the whole model"):
            ours(folder, out / "run", trainer_tokenizer(), objective=objective, **settings)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(InputError, match="DEEPSPEED is not known here"):
        prepare_sharding(accelerator)
    (out / f"{distributed.number()}.json").write_text(json.dumps(said))


def shard_on_cpu() -> None:
    """Let accelerate, which has FSDP on GPUs alone, believe that these processes have some. PyTorch's own has it on
    both."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    make = AcceleratorState.__init__

    def make_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make_sharded  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    works = (supervised, reinforced, resumed, rolled, sampled, evaluated, broken, whole, refused, unknown)
    if "sharded" in sys.argv:
        shard_on_cpu()
    out = Path(sys.argv[2])
    {work.__name__: work for work in works}[sys.argv[1]](out)
    if "sharded" in sys.argv:  # a thread that gloo leaves behind here aborts the interpreter's own end now and then
        (out / f"done{distributed.number()}").touch()
        while len(list(out.glob("done?"))) < distributed.count():  # who leaves closes connections
            time.sleep(0.01)
        sys.stderr.flush()
        os._exit(0)
