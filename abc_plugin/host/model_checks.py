"""Everything that can be refused before a model is loaded: each check raises a one-line UserError."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from operator import attrgetter
from pathlib import Path

from datasets import Dataset
from transformers import PretrainedConfig

from abc_plugin import output_directory
from abc_plugin.attention import attach, model_files, scalar_head
from abc_plugin.attention.evidence_readers import attach_readers, check_causal
from abc_plugin.attention.layers import mixing_layer, skeleton
from abc_plugin.attention.row_reader import MIXED
from abc_plugin.attention.signed_contribution import check_last_layer
from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import UserError
from abc_plugin.host.arguments import announce, reward_models
from abc_plugin.host.prompt_dataset import check_lengths, check_rollouts, read_data, rendered
from abc_plugin.text.check_tokenizers import load_tokenizer
from abc_plugin.text.remote_credit import SPANS
from abc_plugin.text.tokenizer_differences import ModelTokenizer, compare
from abc_plugin.text.tokenizer_mapping import check_template

FLAGS = {name: f"--{name}.model_name_or_path" for name in ("actor", "reward", "critic")}
READ = 1000  # prompts that both tokenizers read before training
SCORERS = ("layer", "heads", "recovery", "tokenizer_check", "reward_text")  # settings that only who scores can heed
ATTENTION = frozenset({"attention", "policy", "policy_last"})
READ_BY = {  # option: the needs that it concerns
    "layer": ATTENTION | {"contribution"},
    "recovery": ATTENTION,
    "heads": frozenset({"attention"}),
    "calls": frozenset({"shapley"}),
}

# What needs a graph of the whole reward model, or of its last layer: (host's setting, refused value, why, needs).
GRADIENTS = frozenset({"gradient", "contribution"})
NO_GRADIENT = (
    ("ds.zero_stage", lambda stage: stage == 3, "ZeRO-3 frees each layer's weights before a backward", {"gradient"}),
    ("reward.offload", bool, "it keeps the reward model's weights on the CPU", {"gradient"}),
    ("ds.ring_attn_size", lambda size: size > 1, "it splits each sequence over processes", GRADIENTS),
    ("ds.tensor_parallel_size", lambda size: size > 1, "it splits each layer over processes", GRADIENTS),
)


def check_method(args: Namespace, shaping: ShapingConfig, *, remote: str | None = None) -> None:
    """Refuse what ``--reward_shaping`` cannot do with the other settings; says so, with the remedy.

    remote: the flag of a reward that comes from elsewhere. Raises UserError. beta 0 heeds nothing.
    """
    method = methods.load(shaping.method)
    if shaping.method == "none" or shaping.beta > 0:
        _check_options(shaping, method)
    if not shaping.dense:
        return
    name = f"--reward_shaping {shaping.method}"
    if shaping.segment == "turn" and not args.train.agent_func_path:
        raise UserError(
            "--shaping.segment turn needs an agent's turns: without --train.agent_func_path a response is one turn, "
            "and its pooled credit the sparse reward; use sentence"
        )
    if remote and method.needs - SPANS.keys() - methods.POLICY:
        raise UserError(
            f"{name} needs the reward model here, and {remote} sends scores and {' or '.join(SPANS)} only; use abc or "
            "abc_signed, or --reward.model_name_or_path"
        )
    if "prefix" in method.needs and shaping.tokenizer_check == "map":
        raise UserError(
            f"{name} reads the score behind each of the policy's tokens, and with --shaping.tokenizer_check map the "
            "reward model's tokens end elsewhere; use abc or grad_input, or a reward model with the policy's tokenizer"
        )
    for path, refused, why, needs in NO_GRADIENT:
        if method.needs & needs and not remote and refused(attrgetter(path)(args)):
            raise UserError(
                f"{name} needs gradients of the reward model, and --{path} {attrgetter(path)(args)} stands in "
                f"the way: {why}; leave it out, or use --reward_shaping prefix or abc"
            )


def _check_options(shaping: ShapingConfig, method: methods.Method) -> None:
    """The plugin's own options against the method."""
    name, default = f"--reward_shaping {shaping.method}", ShapingConfig()
    for option in (*READ_BY, "drop", "entropy_floor", "segment"):
        given = getattr(shaping, option)
        if given == getattr(default, option):
            continue
        if shaping.method == "none":
            raise UserError(
                f"--shaping.{option} {given} changes credit, and --reward_shaping none gives none: name a "
                "method, such as abc, or leave the option out"
            )
        if option in READ_BY and not READ_BY[option] & method.needs:
            reads = "the policy's attention" if ATTENTION & method.needs else "no attention"
            reads, use = ("no parts of a response", "shapley") if option == "calls" else (reads, "abc")
            raise UserError(f"{name} reads {reads}: leave --shaping.{option} {given} out, or use {use}")
        if option in ("drop", "entropy_floor") and method.weights is None:
            raise UserError(
                f"{name} gives signed credit, not shares of a whole that could be renormalised: leave "
                f"--shaping.{option} {given} out, or use abc"
            )


def check_ensemble(args: Namespace) -> None:
    """Several reward models: no path missing or twice. Raises UserError."""
    given, paths = args.reward.model_name_or_path or "", reward_models(args)
    name = f"--reward.model_name_or_path {given}"
    if "," in given and (len(paths) != given.count(",") + 1 or len(set(paths)) != len(paths)):
        raise UserError(f"{name}: give each reward model once, with single commas between them")


def check_models(
    args: Namespace, shaping: ShapingConfig, data: Dataset | None = None, *, runs_here: bool = True
) -> None:
    """Models have their weights and heads and share a tokenizer, and the attention tap fits the reward model.

    data: the prompts, where they are on this machine.  runs_here: whether it will run the models, so that its devices
    and packages matter.
    """
    for template in ("apply_chat_template", "input_template"):
        if shaping.reward_text == "chat" and getattr(args.data, template):
            raise UserError(
                f"--shaping.reward_text chat needs the bare prompts, but --data.{template} puts them into "
                "another template; use --shaping.reward_text plain"
            )
    check_method(args, shaping)
    check_ensemble(args)
    for path, config in check_files(args, shaping, data, runs_here=runs_here).items():
        check_readers(args, path, config, shaping, runs_here=runs_here)
    check_policy(args, shaping, runs_here=runs_here)


def check_files(
    args: Namespace, shaping: ShapingConfig, data: Dataset | None = None, *, runs_here: bool = True
) -> dict[str, PretrainedConfig]:
    """Every model's files are the whole of it, and it can read the ids that will come; returns the rewards' configs.

    The prompts are read by both tokenizers, besides the built-in texts, and by the policy's as far as they fit.
    Raises UserError. Changes ``args`` as ``_other_tokenizer``.
    """
    policy, critic = args.actor.model_name_or_path, args.critic.model_name_or_path
    if base := model_files.adapter_base(policy):
        model_files.check_adapter(FLAGS["actor"], policy)
        policy = base
    config = model_files.read_config(FLAGS["actor"], policy)
    model_files.check_weights(FLAGS["actor"], policy, config)
    ours = _side(args, FLAGS["actor"], policy)
    if ours.tokenizer.eos_token_id is None:
        raise UserError(f"{FLAGS['actor']} {policy}: its tokenizer has no end-of-sequence token; give it an eos_token")
    model_files.check_savable(FLAGS["actor"], policy, ours.tokenizer)
    _check_reads(args, FLAGS["actor"], policy, config, ours)
    _check_packing(args, FLAGS["actor"], policy, config)
    texts = [] if data is None or args.data.max_images_per_prompt else rendered(args, data, ours.tokenizer)
    check_lengths(args, texts, ours.tokenizer)
    options = {"head": args.ds.value_head_prefix, "normalise": args.reward.normalize_enable}
    configs = {path: scalar_head.check_files(path, **options, flag=FLAGS["reward"]) for path in reward_models(args)}
    flags = dict.fromkeys(configs, FLAGS["reward"])
    if critic and critic not in configs:
        flags[critic] = FLAGS["critic"]
        configs[critic] = scalar_head.check_files(critic, **options, flag=flags[critic], new_head=True)
    for path, flag in flags.items():
        theirs = _side(args, flag, path)
        _check_packing(args, flag, path, configs[path])
        if shaping.reward_text == "chat" and flag == FLAGS["reward"]:
            try:
                check_template(theirs.tokenizer)
            except UserError as error:
                raise UserError(f"--shaping.reward_text chat, {flag} {path}: {error}") from None
        if differences := compare(ours, theirs, texts[:READ]).incompatibilities():
            _other_tokenizer(args, shaping, flag, path, differences)
            if shaping.tokenizer_check == "map":
                _check_reads(args, flag, path, configs[path], theirs, cut=True)
                continue
        _check_reads(args, flag, path, configs[path], ours)
        unknown = range(max(ours.vocabulary.values()) + 1, ours.embedding_rows or 0)
        if not runs_here and unknown and (theirs.embedding_rows or unknown.stop) < unknown.stop:
            print(
                f"abc_plugin: WARNING: the policy has embedding rows for the ids {unknown.start} to "
                f"{unknown.stop - 1}, which are no tokens; vLLM may draw one all the same, and {flag} {path} has only "
                f"{theirs.embedding_rows} rows: the run would end there"
            )
    return {path: configs[path] for path in reward_models(args)}


def _check_packing(args: Namespace, flag: str, path: str, config: PretrainedConfig) -> None:
    """Raises UserError where packed samples would mix."""
    if args.ds.packing_samples and (mixing := mixing_layer(skeleton(config, name=f"{flag} {path}"))):
        raise UserError(f"--ds.packing_samples, {flag} {path}: {MIXED.format(mixing)}")


def _check_reads(
    args: Namespace, flag: str, path: str, config: PretrainedConfig, side: ModelTokenizer, *, cut: bool = False
) -> None:
    """``model_files.check_reads`` of the ids of ``side``.  cut: text in own tokens is cut to the model's positions."""
    top_id = max(side.vocabulary.values())
    model_files.check_reads(flag, path, config, top_id, 0 if cut else args.data.max_len, "--data.max_len")


def check_output(args: Namespace, *, merged: str = "") -> None:
    """No model of the run lies where it will write. merged: the directory within the output that it writes too.

    Raises UserError.
    """
    output = args.ckpt.output_dir
    models = {getattr(args, name).model_name_or_path: FLAGS[name] for name in ("critic", "actor")}
    models |= dict.fromkeys(reward_models(args), FLAGS["reward"])
    models.pop(None, None)
    written = [output, f"{output}_critic", Path(output) / merged, *Path(args.ckpt.path).glob("*_hf")]
    output_directory.refuse_models(written, models)


def check_served(args: Namespace) -> None:
    """The files of a reward model that is served, which reads its own tokens. Raises UserError."""
    path, flag = args.reward.model_name_or_path, FLAGS["reward"]
    if not path:
        raise UserError(f"{flag} is missing; give the reward model to serve")
    config = scalar_head.check_files(path, head=args.ds.value_head_prefix, normalise=args.reward.normalize_enable)
    _check_reads(args, flag, path, config, _side(args, flag, path))
    _check_packing(args, flag, path, config)


def check_readers(
    args: Namespace, path: str, config: PretrainedConfig, shaping: ShapingConfig, *, runs_here: bool = True
) -> None:
    """A reward model of this structure can be read as the method needs; no weights are read."""
    needs = methods.load(shaping.method).needs if shaping.dense else frozenset()
    if not needs & {"attention", "prefix", "contribution"}:
        return
    name = f"--reward.model_name_or_path {path}"
    model = skeleton(config, args.ds.attn_implementation, name=name, runs_here=runs_here)
    if "prefix" in needs:
        check_causal(model)
    if "contribution" in needs:
        check_last_layer(model, shaping.layer)
    options = {"layer": shaping.layer, "recovery": shaping.recovery, "heads": shaping.head_list}
    for reader in attach_readers(model, needs & {"attention"}, **options).values():
        reader.close()


def check_policy(args: Namespace, shaping: ShapingConfig, *, runs_here: bool = True) -> None:
    """The policy's attention can be read, where the method needs it."""
    need, path = policy_need(shaping), args.actor.model_name_or_path
    if need is None:
        return
    if args.ds.ring_attn_size > 1:
        raise UserError(
            f"--reward_shaping {shaping.method} reads the policy's attention over whole sequences, which "
            f"--ds.ring_attn_size {args.ds.ring_attn_size} splits; leave that out, or use abc"
        )
    flag = FLAGS["actor"]
    try:
        path = model_files.adapter_base(path) or path
        config = model_files.read_config(flag, path)
        model = skeleton(config, args.ds.attn_implementation, name=f"{flag} {path}", runs_here=runs_here)
        attach(model, layer=shaping.layer, recovery=shaping.recovery).close()
    except UserError as error:
        raise UserError(f"--reward_shaping {shaping.method} reads the policy {path}: {error}") from None


def _other_tokenizer(args: Namespace, shaping: ShapingConfig, name: str, path: str, differences: list[str]) -> None:
    """What ``--shaping.tokenizer_check`` says to a model that reads text otherwise than the policy."""
    policy = args.actor.model_name_or_path
    is_reward = path in reward_models(args)
    difference = differences[0] + (f" (and {len(differences) - 1} more)" if len(differences) > 1 else "")
    if shaping.tokenizer_check == "off":
        print(
            f"abc_plugin: WARNING: --shaping.tokenizer_check off: {name} {path} reads the policy's ids as its own, "
            f"though {difference}; reward and credit are those of another text"
        )
    elif shaping.tokenizer_check == "strict" or not is_reward:
        remedy = " or --shaping.tokenizer_check map" if is_reward else ""
        raise UserError(
            f"{name} {path} and the policy {policy} must share a tokenizer, but {difference}; use a model trained "
            f"with the policy's tokenizer{remedy}; abc-rlhf check-tokenizers {policy} {path} shows all"
        )
    else:
        print(f"abc_plugin: {name} {path} reads the text in its own tokens: {difference}")
        if args.critic.model_name_or_path == path:
            # The host's default is the reward model, which cannot read the policy's ids.
            args.critic.model_name_or_path = policy
            print(f"abc_plugin: the critic starts from the policy {policy}, whose tokens it reads")


def _side(args: Namespace, name: str, path: str) -> ModelTokenizer:
    try:
        return load_tokenizer(path, use_fast=not args.data.disable_fast_tokenizer)
    except UserError as error:
        raise UserError(f"{name} {error}") from None


def preflight(args: Namespace, shaping: ShapingConfig) -> None:
    """Check models, heads, tokenizers and the attention tap from files alone.

    With a remote reward there is no reward model here; its replies are checked when they come. Models that are not on
    this machine are checked by the reward model's worker before it loads (``args.shaping_checked`` is False then).
    Raises UserError as ``check_models``, and for settings that a remote reward cannot heed.
    """
    refuse_on_ray(args, shaping)
    check_output(args)
    data = read_data(args) if Path(args.data.prompt_dataset or "").is_file() else None
    if data is not None:
        split = args.ds.ring_attn_size * args.ds.tensor_parallel_size
        check_rollouts(args, len(data), args.actor.num_nodes * args.actor.num_gpus_per_node // split)
    for source in ("reward.remote_url", "train.agent_func_path"):
        if attrgetter(source)(args):
            check_method(args, shaping, remote=f"--{source}")
            _remote(f"--{source}", shaping)
            if not absent_models(args):
                check_files(args, shaping, data, runs_here=False)
                check_policy(args, shaping, runs_here=False)
            announce(args, shaping)
            return
    absent = absent_models(args)
    args.shaping_checked = not absent
    if absent and shaping.tokenizer_check == "map":
        raise UserError(f"--shaping.tokenizer_check map needs the models on the driver's machine too: {absent[0]}")
    if absent:
        print(f"abc_plugin: not on this machine, so checked by the worker that loads it: {', '.join(absent)}")
    else:
        check_models(args, shaping, data, runs_here=False)
    announce(args, shaping)


def absent_models(args: Namespace) -> list[str]:
    """The models that are not on this machine."""
    paths = (args.actor.model_name_or_path, args.critic.model_name_or_path, *reward_models(args))
    return [path for path in paths if path and model_files.is_absent(path)]


def _remote(source: str, shaping: ShapingConfig) -> None:
    default = ShapingConfig()
    heeded = ("layer", "recovery") if policy_need(shaping) else ()
    for field in dataclasses.fields(shaping):
        given = getattr(shaping, field.name)
        if field.name in SCORERS and field.name not in heeded and given != getattr(default, field.name):
            raise UserError(
                f"{field.metadata['flag']} {given} means nothing with {source}: it is the business of whoever scores "
                "(abc-rlhf serve-rm takes --shaping.layer, --shaping.heads and --shaping.recovery)"
            )
    for need in sorted(methods.load(shaping.method).needs & SPANS.keys()) if shaping.dense else ():
        print(
            f"abc_plugin: {source} is set: --reward_shaping {shaping.method} needs {SPANS[need]} in every reply "
            f"(abc-rlhf serve-rm --reward_shaping {shaping.method} sends them); a reply without ends the run"
        )


def refuse_adapter(args: Namespace) -> None:
    """Raises UserError where the policy to train is itself an adapter."""
    path = args.actor.model_name_or_path
    if base := model_files.adapter_base(path):
        raise UserError(
            f"--actor.model_name_or_path {path} is a LoRA adapter of {base}; train that, or the merged "
            "model that --local.merge_adapter writes beside an adapter"
        )


def refuse_on_ray(args: Namespace, shaping: ShapingConfig) -> None:
    """Raises UserError for adapters and 4-bit policies on Ray: the host sends their parameters to vLLM as they are."""
    for name, sent in (("ds.lora.rank", "the adapter's own parameters"), ("ds.load_in_4bit", "packed 4-bit weights")):
        if value := attrgetter(name)(args):
            raise UserError(
                f"--{name} {value} does not work on Ray: OpenRLHF sends vLLM {sent}, which it "
                "cannot load; use abc-rlhf local"
            )
    if shaping.train_layers:
        raise UserError(f"--local.train_layers {shaping.train_layers} means nothing on Ray; use abc-rlhf local")
    refuse_without_lora(shaping, "on Ray; leave it out, or use abc-rlhf local")
    refuse_adapter(args)


def refuse_without_lora(shaping: ShapingConfig, why: str) -> None:
    """Raises UserError for settings of adapters; ``why`` ends the sentence "--local.x means nothing …"."""
    for name in ("share_base", "merge_adapter"):
        if getattr(shaping, name):
            raise UserError(f"--local.{name} means nothing {why}")
