#!/usr/bin/env bash
# Stage 3 of SAPO on verl 0.9.1, from the stage-2 policy of `sapo run --preset paper`: bash docs/verl/train.sh POLICY DATA
# Set the numbers of GPUs and tokens to your machine's; what verl asks for beyond these is in its own documentation.
# Without KL: verl would sum it over tokens, as it does the loss here. The fork's way, with a KL of 1e-3 and every token
# alike, is step_aligned_tokens with loss_agg_mode=token-mean and use_kl_loss=True.
set -euo pipefail
policy=$1 data=$2
sapo data verl "$data" --model "$policy" --to rows/train.parquet
sapo data verl "$data" --model "$policy" --to rows/valid.parquet --rows valid
export VERL_USE_EXTERNAL_MODULES=sapo.integrations.verl
python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=step_aligned \
    algorithm.use_kl_in_reward=False \
    data.train_files=rows/train.parquet \
    data.val_files=rows/valid.parquet \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=1024 \
    actor_rollout_ref.model.path="$policy" \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \
    actor_rollout_ref.actor.optim.lr=5e-7 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.agent.default_agent_loop=step_aligned \
    actor_rollout_ref.rollout.agent.agent_loop_config_path=docs/verl/agent_loop.yaml \
    trainer.n_gpus_per_node=8 \
    trainer.total_epochs=10
