# Sourced by the scripts beside it: the paper's PPO settings (its Tables 2 to 4; README.md explains each line).
#
#   RANKS=2 bash …            two processes by torchrun;  LAUNCHER="deepspeed --num_gpus 2 --module abc_plugin": or by any other
#   SMOKE=1 bash …            two short steps with the embedded default in place of the models, the flags otherwise as they are
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
if [ -z "${VIRTUAL_ENV:-}" ]; then bash launch/environment.sh; fi  # an active environment is used as it is
export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH TOKENIZERS_PARALLELISM=false
launcher=${LAUNCHER:-abc-rlhf}
if [ "${RANKS:-1}" -gt 1 ] && [ -z "${LAUNCHER:-}" ]; then
    launcher="torchrun --standalone --nproc_per_node $RANKS -m abc_plugin"
fi

smoke=()
if [ -n "${SMOKE:-}" ]; then
    export HF_HUB_OFFLINE=1
    if [ -z "${DEMO:-}" ]; then abc-rlhf prepare; fi
    demo=${DEMO:-$(abc-rlhf prepare --path)}
    POLICY=$demo/policy REWARD_MODEL=$demo/reward_model PROMPTS=$demo/prompts.jsonl
    smoke=(
        --data.input_key input --data.max_samples 8 --data.max_len 48 --rollout.max_new_tokens 8
        --rollout.batch_size 4 --rollout.micro_batch_size 2 --train.batch_size 2 --train.max_epochs 1
    )
fi

ppo=(
    --algo.advantage.gamma 1 --algo.advantage.lambd 0.95
    --actor.eps_clip 0.2 --critic.value_clip 0.2
    --actor.adam.lr 1.41e-5 --actor.adam.betas 0.9 0.999 --actor.lr_scheduler constant --actor.max_norm 0
    --critic.adam.lr 1.41e-5 --critic.adam.betas 0.9 0.999 --critic.lr_scheduler constant --critic.max_norm 0
    --algo.kl.init_coef 0.2 --algo.kl.horizon 10000 --algo.kl.estimator k1
    --reward.clip_range -1000000 1000000
    --rollout.temperature 1 --rollout.top_p 1
    --train.batch_size "${RANKS:-1}" --train.micro_batch_size 1
)
qlora=(--ds.load_in_4bit --ds.lora.rank 16 --ds.lora.alpha 32 --actor.gradient_checkpointing_enable)

# train OUT NATS_PER_RESPONSE TOKENS [flags]: the host holds KL in nats per token, the paper per response
train() {
    $launcher local "${ppo[@]}" \
        --actor.model_name_or_path "$POLICY" --reward.model_name_or_path "$REWARD_MODEL" \
        --critic.model_name_or_path "$POLICY" --data.prompt_dataset "$PROMPTS" --data.input_key prompt \
        --algo.kl.target "$(awk "BEGIN {print $2 / $3}")" --rollout.max_new_tokens "$3" \
        --ckpt.output_dir "$1" --ckpt.path "$1/checkpoints" --ckpt.save_steps 25 --ckpt.load_enable \
        --reward_shaping abc --shaping.beta 0.8 "${@:4}"
}
