"""``abc-rlhf local``: OpenRLHF's own training in the processes of one machine, without Ray and vLLM."""
