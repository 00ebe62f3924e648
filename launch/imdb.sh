# Sourced by the scripts beside it: the environment, the embedded default and one setting of PPO on it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then bash launch/environment.sh; fi  # an active environment is used as it is
export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Faster on few cores: threads that wait do not spin, and freed memory is kept for the next step.
export KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE
export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

if [ -z "${DEMO:-}" ]; then abc-rlhf prepare; fi
demo=${DEMO:-$(abc-rlhf prepare --path)}  # DEMO=DIR: another directory of that layout
common=(
    --reward.model_name_or_path "$demo/reward_model"
    --data.max_len 64 --rollout.max_new_tokens 16 --rollout.micro_batch_size 32
)
if ! grep -qsE 'avx512bw|bf16' /proc/cpuinfo && ! command -v nvidia-smi >/dev/null; then  # no fast bf16: 50 times slower
    common+=(--ds.param_dtype fp32)
fi

# train OUT [flags]: 24 PPO steps of 32 completions, the last 4 layers; flags given later win. study/embedded.yaml has the same.
train() {
    abc-rlhf local "${common[@]}" \
        --actor.model_name_or_path "$demo/policy" \
        --data.prompt_dataset "$demo/prompts.jsonl" --data.max_samples 768 \
        --rollout.batch_size 32 --train.batch_size 16 --train.micro_batch_size 16 \
        --local.train_layers 4 --actor.adam.lr 7e-4 --actor.lr_scheduler constant_with_warmup \
        --critic.adam.lr 3e-4 --critic.lr_scheduler constant_with_warmup \
        --algo.advantage.lambd 0.95 --algo.kl.init_coef 0.2 \
        --ckpt.output_dir "$1" --ckpt.path "$1/checkpoints" "${@:2}"
}

# evaluate POLICY FILE [flags]: 128 held-out prompts, one sampled completion each
evaluate() {
    abc-rlhf evaluate "${common[@]}" --actor.model_name_or_path "$1" --out "$2" \
        --data.prompt_dataset "$demo/heldout.jsonl" --data.max_samples 128 "${@:3}"
}
