"""An agent as OpenRLHF loads it: two turns, a reward by a rule, and credit on the text of each action."""

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class TwoTurns(AgentInstanceBase):
    def __init__(self, *args, **kwargs):
        self.turns = 0

    async def step(self, states, **kwargs):
        self.turns += 1
        return {
            "rewards": torch.tensor(0.1 * len(states["action_text"])),
            "environment_feedback": " Go on:" if self.turns == 1 else "",
            "done": self.turns == 2,
        }


class ShortTurns:
    """The engine, with four tokens a turn: the host gives the first turn all that is left of the length."""

    def __init__(self, engine):
        self.engine = engine

    async def generate(self, tokens, sampling_params, **kwargs):
        sampling_params.max_tokens = 4
        return await self.engine.generate(tokens, sampling_params, **kwargs)


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(TwoTurns)

    async def execute(self, *args, hf_tokenizer, llm_engine, **kwargs):
        response = await super().execute(*args, hf_tokenizer=hf_tokenizer, llm_engine=ShortTurns(llm_engine), **kwargs)
        length = [len(hf_tokenizer.decode(response["observation_tokens"][:at])) for at in range(49)]
        spans = [[length[start], length[end], 1.0] for start, end in response["action_ranges"]]
        return response | {"extra_logs": {"credit_spans": spans}}
