"""``abc-rlhf`` in float32, which OpenRLHF's flag does not offer: what differs then differs by more than rounding."""

import sys
from argparse import Namespace

import torch

from abc_plugin import cli


def main() -> int:
    from abc_plugin.host.imports import import_host

    import_host()
    import openrlhf.utils.utils

    from abc_plugin.local import one_process

    stock = one_process.parse_for_one_process

    def parse(*words: object) -> tuple[Namespace, list[str]]:
        args, ignored = stock(*words)
        args.ds.param_dtype = "fp32"
        return args, ignored

    openrlhf.utils.utils.convert_to_torch_dtype = lambda _: torch.float32
    one_process.parse_for_one_process = parse
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
