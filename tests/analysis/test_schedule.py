"""What runs while a collective is under way, in programs written by hand."""

from test_compiled import ALONG_DATA, Written, mesh_of

from research.analysis.schedule import Schedule


class Scheduled(Written):
  """A program whose instructions run in the order in which they were written."""

  def spans(self, order=None):
    for computation in (self.entry, *self.loops):
      ids = [i.id for i in computation.instructions]
      ids = order if order and computation is self.entry else ids
      self.module.schedule.sequences.add(key=computation.id).value.instruction_ids.extend(ids)
    read = Schedule(self.module)
    found = read.spans(mesh_of(order=range(8)))
    return [(s.asynchronous, s.products, s.loops) for s in found], read.products()

  def loop(self, trips, products):
    """Writes the two computations of a loop; returns a function that writes the loop itself."""
    body, condition = self.function(), self.function()
    self.computation = next(c for c in self.module.computations if c.id == body)
    x = self.add("parameter")
    for _ in range(products):
      x = self.add("dot", x, x)
    self.computation = next(c for c in self.module.computations if c.id == condition)
    self.add("parameter")
    self.loops += [c for c in self.module.computations if c.id in (body, condition)]
    config = f'{{"known_trip_count":{{"n":"{trips}"}}}}'.encode()
    called = {"called_computation_ids": [body, condition], "backend_config": config}
    return lambda x: self.add("while", x, **called)

  def __init__(self):
    super().__init__()
    self.loops = []


def test_a_pair_is_open_across_a_loop():
  program = Scheduled()
  loop = program.loop(trips=5, products=3)
  program.main()
  x = program.add("parameter")
  started = program.add("all-reduce-start", x, channel_id=1, **ALONG_DATA)
  program.add("dot", x, x)
  loop(x)
  program.add("all-reduce-done", started)
  program.add("dot", x, x)
  assert program.spans() == ([(True, 16, (5,))], 17)


def test_the_schedule_decides_and_not_the_order_in_the_file():
  program = Scheduled()
  program.main()
  x = program.add("parameter")
  product = program.add("dot", x, x)
  started = program.add("all-reduce-start", x, channel_id=1, **ALONG_DATA)
  done = program.add("all-reduce-done", started)
  assert program.spans([x, started, product, done])[0] == [(True, 1, ())]


def test_a_collective_without_an_end_of_its_own_is_synchronous():
  program = Scheduled()
  program.main()
  x = program.add("parameter")
  program.add("all-reduce", x, channel_id=1, **ALONG_DATA)
  program.add("dot", x, x)
  assert program.spans() == ([(False, 0, ())], 1)


def test_between_slices_the_result_comes_by_the_receipt_of_the_same_token():
  """Devices 0 to 3 of two slices: what is sent ends when the answer is there."""
  program = Scheduled()
  loop = program.loop(trips=7, products=2)
  program.main()
  x, token = program.add("parameter"), program.add("after-all", shape={"element_type": 17})
  attributes = {
    "_xla_host_transfer_handler_name": "xla_megascale_runtime",
    "_xla_megascale_transfer_type": "ALL_REDUCE",
    "_xla_megascale_target": "{0,2,4,6},{1,3,5,7}",
  }
  pairs = [{"key": key, "value": value} for key, value in attributes.items()]
  host = {"is_host_transfer": True, "frontend_attributes": {"map": pairs}}
  sent = program.add("send", x, token, **host)
  received = program.add("recv", token, **host)
  program.add("send-done", sent, is_host_transfer=True)
  loop(x)
  program.add("recv-done", received, is_host_transfer=True)
  assert program.spans()[0] == [(True, 14, (7,))]


def test_a_chain_of_fusions_ends_with_its_last():
  """XLA:TPU repeats the collective in each of the fusions that run beside it."""
  program = Scheduled()
  chain = {"frontend_attributes": {"map": [{"key": "chain_id", "value": "0"}]}}
  steps = []
  for target in ("AsyncCollectiveStart", "", "AsyncCollectiveDone"):
    steps.append(program.function())
    x = program.add("all-reduce", program.add("parameter"), **ALONG_DATA, **chain)
    program.add("custom-call" if target else "tuple", x, custom_call_target=target)
  program.main()
  x = program.add("parameter")
  x = program.add("fusion", x, called_computation_ids=[steps[0]])
  program.add("dot", x, x)
  x = program.add("fusion", x, called_computation_ids=[steps[1]])
  program.add("dot", x, x)
  program.add("fusion", x, called_computation_ids=[steps[2]])
  assert program.spans()[0] == [(True, 2, ())]
