"""The command that says what the paper's preset takes."""

from dataclasses import dataclass
from pathlib import Path

from sapo.cli.options import Split, at_least_one, conversations, names, sizes
from sapo.errors import InputError


@dataclass(frozen=True)
class Plan:
    """Say what the preset paper takes for a data set: tokens, arithmetic, the memory of a GPU, and how to start it."""

    data: Path | None = None
    """Folder of TSV files, or a world that is made: `reasoning`, where thinking pays, also where left out, or
    `synthetic`, the control where it is pointless."""
    backbone: str | None = None
    """Pretrained model: a folder, or a name on the Hugging Face hub; Qwen/Qwen3-1.7B where left out. It and Qwen3 of
    0.6B and 4B need no network."""
    lora: int | None = None
    """Train adapters of this rank."""
    rationales: Path | None = None
    """A teacher's file (`sapo data explain`), whose sentences are the thoughts."""
    conversations: Path | None = None
    """JSON lines of conversations that stage 1 reads too."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    split: Split = "auto"
    """Which split."""
    gpus: tuple[int, ...] = (1, 4, 8)
    """Numbers of GPUs."""
    tflops: float | None = None
    """What a GPU does, 10^12 operations a second, of which times are made. Writing completions is slower than that."""
    measure: bool = False
    """Also run a few updates of each stage on this machine, with random weights of this shape, and make times of them.
    On a GPU the memory that they took is said beside the formula's. The weights are written to the system's folder of
    temporary files meanwhile."""

    def __call__(self) -> None:
        from transformers.utils.logging import disable_progress_bar

        from sapo.experiments import measuring, planning, recipes
        from sapo.experiments.run_folder import Job
        from sapo.experiments.starts import words_and_traces
        from sapo.policy.backbone import PAPER_BACKBONE, Pretrained

        at_least_one("lora", self.lora)
        start = Pretrained(self.backbone or PAPER_BACKBONE, lora_rank=self.lora)
        start.check()
        disable_progress_bar()
        is_folder = Path(start.name).is_dir()
        counted, said = sizes(self.data, self.sids, self.split, self.rationales), conversations(self.conversations)
        recipe = recipes.paper(*counted, start, len(said))
        data, rationales = names(self.data, self.rationales)
        job = Job(recipe, "", data, self.sids, self.split, rationales)
        config, tokenizer = planning.model_config(start), planning.plan_tokenizer(start, job.world)
        before = len(tokenizer)
        traces = words_and_traces(job)[1]
        lengths = planning.measure_lengths(recipe, job.world, traces, tokenizer, said)
        added = len(tokenizer) - before
        vocabulary = added + (before if is_folder else config.get_text_config().vocab_size)
        size = planning.Size.of(config, vocabulary)
        plans = {}
        for gpus in self.gpus:
            at_least_one("gpus", gpus)
            try:
                plans[gpus] = planning.plan(recipe, size, lengths, gpus)
            except InputError as error:
                raise InputError(f"--gpus {gpus}: {error}") from error
        print(f"{start.name}: {size.parameters:,} parameters, {vocabulary:,} tokens")
        exact = "" if is_folder else ", by a tokenizer learnt from the titles"
        print(
            f"mean tokens{exact}: stage 1 {lengths.stage1:.0f}, stage 2 {lengths.stage2:.0f}, prompt "
            f"{lengths.prompt:.0f}, completion {lengths.stage2_learnt:.0f} (at most {lengths.longest_completion})"
        )
        command = ["run", "--preset", "paper", "--backbone", start.name]
        for name in ("data", "lora", "rationales", "conversations"):
            command += [] if getattr(self, name) is None else [f"--{name}", str(getattr(self, name))]
        command += ["--sids", self.sids] if self.sids != "sids" else []
        command += ["--split", self.split] if self.split != "auto" else []
        for gpus, stages in plans.items():
            print(f"\n{gpus} GPU{'s' * (gpus > 1)}: {planning.launch(command, gpus)}")
            if stages[0].in_parts is not None:
                print(f"or in parts: {planning.launch(command, gpus, in_parts=True)}")
            for stage in stages:
                line = (
                    f"  stage {stage.name}  {stage.updates:6,} updates  {stage.tokens / 1e6:8,.0f} M tokens  "
                    f"{stage.operations / 1e18:8.1f} x 10^18 operations  {stage.memory / planning.GIB:6.1f} GiB a GPU"
                )
                if stage.in_parts is not None:
                    line += f", {stage.in_parts / planning.GIB:.1f} in parts"
                hours = "" if self.tflops is None else f"  {stage.operations / gpus / self.tflops / 3.6e15:8.1f} h"
                print(line + hours)
        seeds, objectives = len(recipe.seeds), len(recipe.objectives)
        print(
            f"\nThe command runs stage 1 {seeds} times, stage 2 {2 * seeds} (with thinking and without) and stage 3 "
            f"{seeds * objectives} ({', '.join(recipe.objectives)}); with `--seeds 1 --objectives sapo` 1, 2 and 1."
            f"\nValidation rows may end stage 1 sooner. Not counted: looks at them, the test, and some 2 GiB that CUDA "
            f"and its allocator keep."
        )
        longest = lengths.longest_prompt + lengths.longest_completion
        if longest > (most := getattr(config.get_text_config(), "max_position_embeddings", longest)):
            print(f"Prompts and completions have up to {longest:,} tokens; this model is made for {most:,}.")
        if not self.measure:
            return
        mean = f"completions of {lengths.stage2_learnt:.0f} tokens, as stage 2 has them"
        print(f"\nMeasured here with random weights of this shape and {mean}; GPUs share it evenly:", flush=True)
        policy = measuring.random_policy(recipe, job.world, config, tokenizer, vocabulary)
        found = measuring.measure(recipe, job.world, traces, policy, lengths, said)
        for stage in planning.plan(recipe, size, lengths, 1):
            of_stage = found[stage.name]
            hours = ", ".join(f"{stage.units * of_stage.seconds / n / 3600:.1f} h on {n}" for n in self.gpus)
            print(f"  {of_stage.describe(stage)}: {hours}")
