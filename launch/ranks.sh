# Sourced by torchrun.sh and deepspeed.sh: settings for an 8B policy and reward model on RANKS GPUs of one machine.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then bash launch/environment.sh; fi  # an active environment is used as it is
export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH TOKENIZERS_PARALLELISM=false
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
smoke=()
if [ -n "${SMOKE:-}" ]; then
    ranks=${RANKS:-$((gpus == 1 ? 1 : 2))}
    export HF_HUB_OFFLINE=1
    if [ -z "${DEMO:-}" ]; then abc-rlhf prepare; fi
    demo=${DEMO:-$(abc-rlhf prepare --path)}
    POLICY=$demo/policy REWARD_MODEL=$demo/reward_model PROMPTS=$demo/prompts.jsonl
    smoke=(
        --data.input_key input --data.max_samples 16 --data.max_len 48 --rollout.max_new_tokens 8
        --rollout.batch_size 8 --rollout.micro_batch_size 2 --train.batch_size 8
    )
fi
: "${POLICY:?a model}" "${REWARD_MODEL:?a reward model with the same tokenizer}" "${PROMPTS:?a dataset or a .jsonl file}"
# Batch sizes are those of all ranks together, micro batches those of one.
flags=(
    --actor.model_name_or_path "$POLICY" --reward.model_name_or_path "$REWARD_MODEL"
    --data.prompt_dataset "$PROMPTS" --data.input_key prompt --data.max_len 1024
    --rollout.max_new_tokens 512 --rollout.batch_size 128 --rollout.micro_batch_size 8
    --train.batch_size 64 --train.micro_batch_size 2
    --ds.zero_stage 3 --actor.gradient_checkpointing_enable
    --actor.adam.lr 5e-7 --critic.adam.lr 9e-6 --algo.kl.init_coef 0.01 --algo.advantage.lambd 0.95
    --ckpt.output_dir "${OUT:-runs/ranks}" --ckpt.path "${OUT:-runs/ranks}/checkpoints"
    --ckpt.save_steps 25 --ckpt.load_enable
    --reward_shaping abc --shaping.beta 0.8
)
