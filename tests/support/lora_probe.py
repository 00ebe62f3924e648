"""A trainer that looks at its own models before and after training; for ``run_variants.probed``."""

import torch
from openrlhf.trainer.ray.launcher import ReferenceModelActor

from abc_plugin.host.install import undecorated
from abc_plugin.local.distributed_ranks import gather_zero3
from abc_plugin.local.trainer import LocalPPOTrainer

IDS = torch.randint(3, 280, (4, 16), generator=torch.Generator().manual_seed(0))
MASK, ACTIONS = torch.ones_like(IDS), torch.ones(4, 15, dtype=torch.bool)


def weights(module):
    """Whole parameters on the CPU by name, also where ZeRO-3 has split them."""
    with gather_zero3(module.parameters()):
        return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}


def storage(*modules):
    """Bytes of all parameters, shared ones once."""
    tensors = {p.data_ptr(): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    return sum(tensors.values())


def changed(before, after):
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def is_trained(name):
    return "lora_" in name or "modules_to_save" in name


class Probed(LocalPPOTrainer):
    facts_file = None  # where what was seen is saved

    def fit(self, global_step=0):
        self.look()
        super().fit(global_step)
        self.look_again()

    def look(self):
        groups = (self.actor_model_group, self.critic_model_group, self.reference_model_group)
        self.policy, self.critic, self.reference = (group.worker for group in groups)
        self.modules = {"policy": self.policy.actor.model.module, "critic": self.critic.critic.module}
        self.before = {name: weights(module) for name, module in self.modules.items()}
        self.facts = {
            "bytes": storage(*self.modules.values()),
            "policy_bytes": storage(self.modules["policy"]),
            "dtypes": {n: p.dtype for n, p in self.modules["critic"].named_parameters() if p.requires_grad},
            "score": weights(self.reward_model_group.worker.model.module)["score.weight"],
            "touched": [],
        }
        self.watch(self.policy, "critic")
        self.watch(self.critic, "policy")

    def watch(self, worker, other):
        """Record what an update of one model does to the other."""
        fit = worker.fit

        def watched(*args, **kwargs):
            before = weights(self.modules[other])
            result = fit(*args, **kwargs)
            self.facts["touched"] += changed(before, weights(self.modules[other]))
            return result

        worker.fit = watched

    def look_again(self):
        for name, module in self.modules.items():
            after = weights(module)
            self.facts[name] = {
                "changed": changed(self.before[name], after),
                "trained": sorted(filter(is_trained, after)),
                "base": sorted(n for n in after if not is_trained(n)),
            }
        alone = undecorated(ReferenceModelActor)(1, 0, self.policy._master_addr, self.policy._master_port)
        alone.init_model_from_pretrained(self.strategy, self.args.actor.model_name_or_path)
        self.facts |= {
            "log_probs": self.policy.forward(IDS, ACTIONS, MASK),
            "reference": self.reference.forward(IDS, ACTIONS, MASK),
            "base": alone.forward(IDS, ACTIONS, MASK),
            "history": self.history,
        }
        self.modules["policy"].eval()
        with torch.no_grad():
            self.facts["logits"] = self.modules["policy"](IDS, attention_mask=MASK).logits.float().cpu()
        torch.save(self.facts, self.facts_file)
