"""Eight CPU devices for every test, whatever the machine has.

LLVM's expensive passes are left out, since the tests compile far more than they compute; the tests
of the command run with all of them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax

jax.config.update("jax_disable_most_optimizations", True)
