"""What cannot be combined: the pairs of a wrapper and a wrapped aggregator that have no sense.

A trait is what a wrapper must know of the aggregator that it wraps:

    memory     keeps leaves from round to round, such as what a worker did not send
    vote       sends signs without a scale
    selects    its value is not the mean of what the workers sent
    noise      adds noise that hides a worker
    secret     masks what a worker sends
    forged     replaces what faulty workers have
    whole      looks at all of a worker's leaves at once
    expansive  its compressor may miss more than all of a value
    dense      what it sends is not zero at most positions
    apart      what it takes of one worker lies elsewhere than what it takes of another
    local      its value differs from worker to worker
    weighted   its value weights the workers by their place in the graph
    directed   what worker i makes of worker j's value is not what j makes of i's
    varying    the workers that it averages change from round to round
    partial    its value is the mean of those workers alone that did not drop out
    everyone   its value counts on what each worker sent in earlier rounds: nobody may be absent
"""

from research.core.base import Aggregator, Compressor

# warm_up: unless all stages are alike in that; methods: their exact rounds, of dc_asgd the squares
_AROUND = ("only_large", "warm_up", "onebit_adam", "zero_one_adam", "marina", "dc_asgd")
_MEMORY = ("error_feedback", "ef21", "diana", "momentum_correction", "demo")

_COMMON_MODEL = (
  "data_parallel",
  "local_sgd",
  "consensus_admm",
  "post_local_sgd",
  "hierarchical_local_sgd",
  "slow_mo",
  "easgd",
  "eamsgd",
  "diloco",
  "streaming_diloco",
  "fed_avg",
  "fed_prox",
  "fed_opt",
  "fed_adam",
  "fed_yogi",
  "fed_adagrad",
  "scaffold",
  "signum",
  "onebit_adam",
  "zero_one_adam",
  "demo",
  "marina",
)

# (wrappers, trait of what they wrap, why not): README shows this table, tests walk it.
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
  (_MEMORY, "memory", "what was not sent would be kept twice, and sent twice"),
  (_MEMORY, "vote", "signs without a scale are no part of the value: the rest of it only grows"),
  (_MEMORY, "selects", "memories add up only where the value is the mean of what was sent"),
  (_MEMORY, "local", "neighbours receive other averages: memories add up in the mean of all alone"),
  (_MEMORY, "noise", "the memory would send the noise back, and one example many times"),
  (_MEMORY, "forged", "the attack belongs around: a faulty worker's memory would only grow"),
  (
    ("error_feedback", "ef21", "momentum_correction", "demo"),
    "expansive",
    "a compressor that may miss more than all of a value lets the memory grow without bound",
  ),
  (("ef21", "diana"), "partial", "a worker that drops out would leave its shift out of the total"),
  (
    ("momentum_correction",),
    "dense",
    "momentum is cleared where something was sent, and here that is everywhere",
  ),
  (
    ("worker_momentum",),
    "noise",
    "it would send one example in many rounds, of which the accountant knows one",
  ),
  (
    ("worker_momentum",),
    "local",
    "what neighbours average are models, of which there is no momentum",
  ),
  (("noisy",), "noise", "one accountant cannot tell what two noises hide"),
  (_AROUND, "noise", "what goes around it is not hidden"),
  (_AROUND, "secret", "what goes around it is not masked"),
  (_AROUND, "selects", "what goes around it is not protected from faulty workers"),
  (("hierarchical",), "memory", "a memory belongs around it: that of a chunk has no place to go"),
  (("hierarchical", "fsdp"), "whole", "each sees only a part of a worker's leaves"),
  (_COMMON_MODEL, "local", "the workers' models would part for good; take d_psgd"),
  (
    ("d_psgd", "dgd", "gradient_tracking", "extra", "admm"),
    "weighted",
    "a worker's steps would count by its place in the graph; take sgp",
  ),
  (("extra", "admm"), "directed", "their dual part needs symmetric weights"),
  (("extra", "admm"), "varying", "their dual part needs the same weights in each round"),
  (
    ("marina",),
    "memory",
    "a whole gradient makes good what was not sent before: a memory would send it again",
  ),
  (
    ("onebit_adam", "zero_one_adam", "marina"),
    "vote",
    "signs without a scale are no momentum, step or difference",
  ),
  (("sparta",), "memory", "it would keep parts of models, not of changes"),
  (("sparta",), "vote", "a sign is no part of a model"),
  (("sparta",), "selects", "the models' mean would not be kept"),
  (("sparta",), "noise", "each worker would take its own noise back from its model"),
  (("sparta",), "expansive", "models would be driven apart"),
  (("sparta",), "partial", "who drops out would add the others' models to its own"),
  (("sparta",), "local", "neighbours receive other averages; take d_psgd"),
  (("sparta",), "apart", "elements would be averaged with zeros"),
)


def traits_of(compressor: Compressor) -> frozenset[str]:
  """The traits that an aggregator has from its compressor."""
  found = [] if compressor.contractive else ["expansive"]
  found += ["apart"] if compressor.sparse and not compressor.linear else []
  return frozenset(found if compressor.sparse else [*found, "dense"])


def refuse(wrapper: str, inner: Aggregator) -> None:
  """Refuses a pair that stands in the table.

  Raises:
    ValueError: with the reason.
  """
  for wrappers, trait, reason in REFUSED:
    if wrapper in wrappers and trait in inner.traits:
      raise ValueError(f"{wrapper} does not go with what it wraps ({trait}): {reason}")
