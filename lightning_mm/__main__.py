"""``lightning-mm`` and ``python -m lightning_mm``.

Data flow: arguments -> the verb that they name -> exit status (0 done, 2 the user can mend it, 143 stopped by SIGTERM).
Help is answered before anything heavy is imported.
"""

import gc
import os
import sys

HELP = """usage: lightning-mm VERB [options]

Partial fine-tuning of multimodal LLMs, and a look inside while they train.

  fit        train under a tuning policy; writes runs/<name>/ with report.html
  validate   loss, token accuracy and exact match on the validation split
  test       the same on the test split, and without pictures
  predict    answer the questions of a file; writes runs/<name>/predictions.jsonl
  replay     run a step again whose loss or gradient was not finite, and say where that comes from
  check      what a fit would read, drop and learn of its data, with samples; takes fit's options
  plan       what a run will cost before it starts, beside every other policy: FLOPs, memory, time; takes fit's options
  inspect    read every layer of a model or run: probes, geometry, and which layers are worth training
  trace      find what causes the answers: causal traces, flow, knockout, ablation, lens, transplantation
  edit       give questions new answers by a closed-form change of one weight, and measure what else changed
  study      train and measure policies against each other over seeds, and say what the intervals carry
  export     write a trained run as a Hugging Face folder or a PEFT adapter, and prove it equal
  report     write report.html of a run anew

lightning-mm VERB --help lists a verb's options; -c FILE.yaml may be given several times, later files win.
  lightning-mm fit -c configs/model/nano.yaml -c configs/data/nano.yaml -c configs/trainer/cpu.yaml \\
      --model.tuning IntermediateOnly --model.tuning.layers 6-16
  lightning-mm fit -c configs/tuning/lora-middle.yaml --print_config
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        return _help()
    if given[0] == "--version":
        from lightning_mm import __version__

        print(__version__)
        return 0
    if "lightning_mm.cli.main" not in sys.modules:
        # Nothing that is imported is garbage; looking for some costs a tenth of the start. ``cli.run`` goes on looking.
        gc.disable()
    from lightning_mm.cli.main import run

    return run(given)


def _help() -> int:
    try:
        print(HELP, flush=True)
    except BrokenPipeError:  # who reads has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
    return 0


if __name__ == "__main__":
    sys.exit(main())
