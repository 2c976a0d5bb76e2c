"""What training a pretrained model takes, before anyone rents a GPU: tokens, arithmetic, and the memory of a GPU.

Counts are those of this code: a prompt is read once for its G completions, logits are made where a token is trained,
activations are computed again in the backward pass, weights and Adam's state are float32, matrices are multiplied in
bfloat16. Bytes and operations are formulas, below, each a line; lengths are measured on rows of the data.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch

from sapo.common.distributed import divide
from sapo.errors import InputError
from sapo.experiments.recipes import Recipe
from sapo.experiments.run_folder import World
from sapo.policy.backbone import BackboneConfig, Pretrained, add_item_tokens, build_backbone
from sapo.policy.policy import Policy
from sapo.training.conversations import Conversation
from sapo.training.examples import IGNORED, ChatExamples
from sapo.training.sharding import FSDP
from sapo.training.traces import Traces

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Published sizes of Qwen3 (arXiv 2505.09388): layers, width, query and key heads, width of the MLP. So that planning
# with the usual models asks nobody.
QWEN3 = {
    "Qwen/Qwen3-0.6B": (28, 1024, 16, 8, 3072),
    "Qwen/Qwen3-1.7B": (28, 2048, 16, 8, 6144),
    "Qwen/Qwen3-4B": (36, 2560, 32, 8, 9728),
}
SAMPLED = 300  # examples of each stage whose lengths are measured
GIB = 2**30
# Bytes of a logit, which arrives in float32 beside the bfloat16 that it was: cross-entropy adds its log and a gradient;
# log-probabilities of sets, whose gradient takes its place, add nothing.
CROSS_ENTROPY, SET_LOGPS = 14, 6


@dataclass(frozen=True)
class Size:
    """What of a model decides memory and arithmetic."""

    body: int
    """Parameters of its layers."""
    table: int
    """Parameters of the embeddings; of embeddings and head where they are two."""
    vocabulary: int
    width: int
    layers: int
    mlp: int
    keys: int
    """Numbers that a token leaves in a layer's cache."""
    head: int
    """Parameters that a logit vector costs."""
    attention: int
    """Width of all query heads."""

    @property
    def parameters(self) -> int:
        """All."""
        return self.body + self.table

    @classmethod
    def of(cls, config: "PreTrainedConfig", vocabulary: int) -> "Size":
        """Of a model of transformers whose embeddings are made as long as a tokenizer."""
        from transformers import AutoModelForCausalLM

        text = config.get_text_config()
        text.vocab_size = vocabulary
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        tables = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        table, heads = sum(weight.numel() for weight in tables), text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            body=model.num_parameters() - table,
            table=table,
            vocabulary=vocabulary,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            mlp=text.intermediate_size,
            keys=2 * size * getattr(text, "num_key_value_heads", heads),
            head=vocabulary * text.hidden_size,
            attention=heads * size,
        )

    def reading(self, tokens: float, logits: float, context: float) -> float:
        """Operations of a forward pass over tokens that each see `context` others, with logits at some of them."""
        return 2 * tokens * (self.body + 2 * self.layers * self.attention * context) + 2 * logits * self.head

    def learning(self, tokens: float, logits: float, context: float, whole: bool = True) -> float:
        """Those of an update: forward, backward (twice as many, once where only adapters get gradients), and the layers
        forward once more."""
        return (3 if whole else 2) * self.reading(tokens, logits, context) + self.reading(tokens, 0, context)

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters: of queries, keys, values and output, and of the MLP's three matrices."""
        ends = 2 * (self.width + self.attention) + (2 * self.width + self.keys) + 3 * (self.width + self.mlp)
        return rank * self.layers * ends

    def state(self, trained: int, reference: bool, processes: int) -> float:
        """Bytes of weights, of gradients and Adam's two averages where they are trained, and of a reference's weights;
        several processes exchange gradients in buckets that are as large as these."""
        return 4.0 * self.parameters * (1 + reference) + (12.0 + 4.0 * (processes > 1)) * trained

    def state_in_parts(self, reference: bool, processes: int) -> float:
        """Those of a process that holds a part of everything (FSDP)."""
        return 4.0 * self.parameters * (4 + reference) / processes

    def activations(self, tokens: float, logits: float, logit_bytes: int) -> float:
        """Bytes of an update's micro-batch: what each layer hands to the next, one layer at work, logits, and the
        weights in bfloat16 that autocast keeps.

        A layer at work keeps about six vectors of the width and three of the MLP's a token, and as many gradients, half
        of it in bfloat16.
        """
        layer = tokens * (6 * self.width + 3 * self.mlp) * 2 * 3
        kept = tokens * self.width * 4 * self.layers + 2 * self.parameters
        return kept + layer + logits * self.vocabulary * logit_bytes

    def cache(self, tokens: float) -> float:
        """Bytes of keys and values, in bfloat16."""
        return tokens * self.layers * self.keys * 2


@dataclass(frozen=True)
class Lengths:
    """Tokens, measured on rows of the data."""

    stage1: float
    """Of an example, on average."""
    stage1_learnt: float
    stage2: float
    stage2_learnt: float
    prompt: float
    """Of a prompt of stage 3, on average."""
    longest_prompt: int
    longest_example: int
    longest_completion: int


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    updates: int
    units: int
    """Examples of stages 1 and 2, prompts of stage 3."""
    tokens: float
    """Read and written in all updates, by all processes."""
    operations: float
    """Of all updates and processes."""
    memory: float
    """Bytes of a GPU that holds the whole model, beside what the allocator and CUDA themselves take."""
    in_parts: float | None
    """Bytes of a GPU that holds a part of it (FSDP); None where it must hold all."""


def measure_lengths(
    recipe: Recipe,
    world: World,
    traces: Traces,
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation] = (),
) -> Lengths:
    """Of `SAMPLED` examples of each stage; the tokenizer gets the tokens of items."""
    model = build_backbone(BackboneConfig(8, 1, 1, 8), tokenizer, 0)
    add_item_tokens(model, tokenizer, world.catalog)
    settings = (world.split.name, world.split.data_hash, recipe.block_budget, recipe.max_history)
    policy = Policy(model, tokenizer, world.catalog, *settings, chat=True)
    found = []
    for task in ("next_item", "thinking"):
        examples = ChatExamples(policy, world.split, task, SAMPLED, 0, traces, conversations=conversations)
        found.append([examples[index] for index in range(SAMPLED)])
    whole = [[len(example["input_ids"]) for example in stage] for stage in found]
    learnt = [[len(example["labels"]) - example["labels"].count(IGNORED) for example in stage] for stage in found]
    asked = policy.prompts(world.split.train.sample(SAMPLED).history, thinking=True)
    prompts = [len(ids) for ids in tokenizer(asked, add_special_tokens=False)["input_ids"]]
    return Lengths(
        stage1=mean(whole[0]),
        stage1_learnt=mean(learnt[0]),
        stage2=mean(whole[1]),
        stage2_learnt=mean(learnt[1]),
        prompt=mean(prompts),
        longest_prompt=max(prompts),
        longest_example=max(*whole[0], *whole[1]),
        longest_completion=policy.layout.longest([recipe.block_budget] * world.catalog.num_levels),
    )


def plan(recipe: Recipe, size: Size, lengths: Lengths, processes: int) -> list[StagePlan]:
    """The three stages on so many GPUs.

    Before training and after it, a GPU holds the whole model even where training spreads it. A completion is as long as
    a thought of stage 2 in what is counted, and as long as its budget in memory.

    Raises:
        InputError: updates that do not divide among the processes and micro-batches.
    """
    start, stages = recipe.backbone, []
    rank = start.lora_rank if isinstance(start, Pretrained) else None
    trained = size.parameters if rank is None else size.adapters(rank)

    def memory(reference: bool, work: float) -> tuple[float, float | None]:
        whole = size.state(trained, reference, processes) + work
        if processes == 1 or rank is not None:
            return whole, None
        return whole, size.state_in_parts(reference, processes) + max(work, 4.0 * size.parameters)

    for name, config, mean_length, learnt in (
        ("1", recipe.stage1, lengths.stage1, lengths.stage1_learnt),
        ("2", recipe.stage2, lengths.stage2, lengths.stage2_learnt),
    ):
        micro, _ = divide("examples", config.batch_size, config.micro_batch, processes)
        examples = config.updates * config.batch_size
        read = micro * lengths.longest_example
        held = memory(False, size.activations(read, read, CROSS_ENTROPY))
        operations = size.learning(examples * mean_length, examples * learnt, mean_length / 2, rank is None)
        stages.append(StagePlan(name, config.updates, examples, examples * mean_length, operations, *held))
    rl = recipe.stage3
    micro, accumulated = divide("prompts", rl.prompts, rl.micro_prompts, processes)
    asked = rl.updates * rl.prompts
    written = asked * rl.group_size * lengths.stage2_learnt
    context = lengths.prompt + lengths.stage2_learnt / 2
    together = asked * lengths.prompt + written
    operations = size.reading(asked * lengths.prompt, asked, lengths.prompt / 2)
    operations += size.reading(written, written, context)  # writing
    operations += size.reading(together, written, context)  # the reference
    operations += size.learning(together, written, context, rank is None)
    row = lengths.longest_completion * rl.group_size
    at_once = min(micro * accumulated, rl.rollout_prompts or rl.prompts)
    writing = size.cache(at_once * (lengths.longest_prompt + row)) + at_once * rl.group_size * size.vocabulary * 8
    writing += 2 * size.parameters  # in bfloat16
    learning = size.activations(micro * (lengths.longest_prompt + row), micro * row, SET_LOGPS)
    held = memory(rank is None, max(writing, learning))
    stages.append(StagePlan("3", rl.updates, asked, together, operations, *held))
    return stages


def launch(command: Sequence[str], processes: int, in_parts: bool = False) -> str:
    """The command line that starts it."""
    if processes == 1:
        return f"sapo {shlex.join(command)}"
    how = FSDP if in_parts else "--multi_gpu"
    return f"accelerate launch {how} --num_processes {processes} -m sapo.cli {shlex.join(command)}"


def model_config(start: Pretrained) -> "PreTrainedConfig":
    """The architecture of a folder, a published Qwen3, or another model of the hub.

    Raises:
        InputError: no such model.
    """
    from transformers import AutoConfig, Qwen3Config

    if start.name in QWEN3:
        layers, width, heads, key_heads, mlp = QWEN3[start.name]
        return Qwen3Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=128,
            intermediate_size=mlp,
            vocab_size=151_936,
            tie_word_embeddings=True,
        )
    try:
        return AutoConfig.from_pretrained(start.name, revision=start.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{start.name!r} is no model that can be planned for: {error}") from error


def plan_tokenizer(start: Pretrained, world: World) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer where it is a folder; else one learnt from the titles: nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(start.name).is_dir():
        return AutoTokenizer.from_pretrained(start.name, padding_side="left", trust_remote_code=False)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*world.catalog.titles, "The user took these items, oldest first:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", padding_side="left")
