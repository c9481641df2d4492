"""Runs programs, written as Spark's users write them, on two Spark executors of one machine.

    python experiments/baselines/peers_spark.py '{"program": "logistic", "file": "a9a", ...}'

The argument is a JSON object with the name of a program and the program's arguments. This file
needs only the extra `spark` and Java, so it may run in a different interpreter from the library.
The program prints a JSON line: the seconds spent reading, the seconds spent computing, and the
results.
"""

# pyright: reportMissingImports=false
# Only the extra `spark` installs PySpark.
import json
import sys
import time
from typing import Any

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F


def session(memory: int) -> SparkSession:
  """Starts two executors with one core each; each executor and the driver get `memory` MiB."""
  return (
    SparkSession.builder.master(f"local-cluster[2,1,{memory}]")
    .config("spark.executor.memory", f"{memory}m")
    .config("spark.driver.memory", f"{memory}m")
    .config("spark.driver.host", "127.0.0.1")
    .config("spark.driver.maxResultSize", "0")
    .config("spark.sql.shuffle.partitions", 2)
    .config("spark.default.parallelism", 2)
    .config("spark.ui.enabled", "false")
    .config("spark.ui.showConsoleProgress", "false")
    .getOrCreate()
  )


def logistic(spark: SparkSession, given: dict[str, Any]) -> dict[str, Any]:
  """Minimizes our logistic objective, mean loss + l2/2 |w|^2 without intercept, by L-BFGS."""
  from pyspark.ml.classification import LogisticRegression

  start = time.perf_counter()
  read = spark.read.format("libsvm").option("numFeatures", given["features"]).load(given["file"])
  rows = read.withColumn("label", (F.col("label") > 0).cast("double")).repartition(2).cache()
  rows.count()
  reading = time.perf_counter() - start
  peer = LogisticRegression(
    regParam=given["l2"],
    maxIter=given["steps"],
    tol=given["tolerance"],
    fitIntercept=False,
    standardization=False,
  )
  start = time.perf_counter()
  model = peer.fit(rows)
  seconds = time.perf_counter() - start
  np.save(given["out"], model.coefficients.toArray())
  losses = [float(value) for value in model.summary.objectiveHistory]
  return {"reading": reading, "seconds": seconds, "losses": losses}


def als(spark: SparkSession, given: dict[str, Any]) -> dict[str, Any]:
  """Runs alternating least squares (rank 10, regParam 0.1); measures RMSE by iteration count."""
  from pyspark.ml.recommendation import ALS

  start = time.perf_counter()
  train, test = (
    spark.read.csv(given[part], schema="user int, item int, stars float", sep="\t").cache()
    for part in ("train", "test")
  )
  both = train.count(), test.count()
  mean = train.agg(F.avg("stars")).first()[0]
  reading = time.perf_counter() - start
  # users and items without training ratings get the mean rating; other predictions are clipped
  guess = F.greatest(F.lit(1.0), F.least(F.lit(5.0), F.nanvl("prediction", F.lit(mean))))
  seconds, errors = 0.0, []
  for count in given["steps"]:
    peer = ALS(userCol="user", itemCol="item", ratingCol="stars", maxIter=count, seed=0)
    start = time.perf_counter()
    model = peer.fit(train)
    for factors in (model.itemFactors, model.userFactors):
      factors.count()
    seconds = time.perf_counter() - start
    squares = (F.col("stars") - guess) ** 2
    errors.append(model.transform(test).agg(F.avg(squares)).first()[0] ** 0.5)
  return {"reading": reading, "seconds": seconds, "rmse": errors, "ratings": both}


def pagerank(spark: SparkSession, given: dict[str, Any]) -> dict[str, Any]:
  """Runs GraphX's PageRank, which GraphFrames also calls, on a file of edges."""
  jvm = spark.sparkContext._jvm
  assert jvm is not None
  graphx, storage = jvm.org.apache.spark.graphx, jvm.org.apache.spark.storage.StorageLevel
  level = storage.MEMORY_AND_DISK()
  start = time.perf_counter()
  graph = graphx.GraphLoader.edgeListFile(
    spark.sparkContext._jsc.sc(), given["file"], False, 2, level, level
  )
  edges = graph.edges().count()
  reading = time.perf_counter() - start
  of = jvm.scala.reflect.ClassTag
  tag = of.Int()
  start = time.perf_counter()
  ranks = graphx.lib.PageRank.run(graph, given["steps"], 1 - given["alpha"], tag, tag).vertices()
  count = ranks.count()
  seconds = time.perf_counter() - start
  ranks.coalesce(1, False, jvm.scala.Option.empty(), None).saveAsTextFile(given["out"])
  return {"reading": reading, "seconds": seconds, "edges": edges, "nodes": count}


def main(given: dict[str, Any]) -> None:
  """Runs a program, and prints the results."""
  spark = session(given["memory"])
  spark.sparkContext.setLogLevel("ERROR")
  of = {"logistic": logistic, "als": als, "pagerank": pagerank}
  found = of[given["program"]](spark, given)
  print(json.dumps(found), flush=True)
  spark.stop()


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
