"""Devices and workers that share a training or a labeling, by `tf.distribute` or on JAX."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pickle
from typing import Any

import numpy as np

from official_selftrain.utils.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Devices of all workers; every replica computes a share of each batch.

    Attributes:
        strategy: `tf.distribute.Strategy`; None on JAX, whose arrays know where they lie.
        replicas: devices of all workers together.
        worker, workers: index of this process, and their number; worker 0 is the chief, which
            alone writes to the run folder.
        compile: whether steps are to be compiled with XLA by `tf.function`.
    """

    strategy: Any
    replicas: int
    worker: int = 0
    workers: int = 1
    compile: bool = False

    @property
    def chief(self):
        return self.worker == 0

    @property
    def local_replicas(self):
        return self.replicas // self.workers

    def scope(self):
        """Variables are made in here."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def dataset(self, function):
        """The input of this worker's replicas.

        Args:
            function: `tf.distribute.InputContext`, or None for all of it -> `tf.data.Dataset`.
        """
        if self.strategy is None or self.replicas == 1:
            return function(None)
        return self.strategy.distribute_datasets_from_function(function)

    def gather(self, value):
        """A picklable value of each worker, as a list, the same on all of them.

        Every worker must call it, as often as the others; each waits for the last.

        Raises:
            UserError: if another worker is gone.
        """
        if self.workers == 1:
            return [value]
        data = pickle.dumps(value)
        with self.readable_worker_errors():
            sizes = self._gather(np.array([len(data)], "int32"))
            everything = self._gather(np.frombuffer(data + bytes(-len(data) % 4), "int32"))
        ends = np.cumsum(-(-sizes // 4))
        starts = ends - -(-sizes // 4)
        parts = [
            everything[start:end].tobytes()[:size]
            for start, end, size in zip(starts, ends, sizes, strict=True)
        ]
        return [pickle.loads(part) for part in parts[:: self.local_replicas]]

    def _gather(self, numbers):
        """int32 `[n]` of each replica, one after the other."""
        result = self._gather_function(numbers)
        return np.asarray(self.strategy.experimental_local_results(result)[0])

    @functools.cached_property
    def _gather_function(self):
        import tensorflow as tf

        def replica(numbers):
            numbers = tf.identity(numbers)  # on the device of the replica
            return tf.distribute.get_replica_context().all_gather(numbers, axis=0)

        return tf.function(
            lambda numbers: self.strategy.run(replica, (numbers,)),
            input_signature=[tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )

    def barrier(self):
        """Returns when every worker has called it."""
        self.gather(None)

    def on_chief_first(self, function):
        """What `function` returns, which the chief calls before the other workers do."""
        if not self.chief:
            self.barrier()
            return function()
        result = function()
        self.barrier()
        return result

    @contextlib.contextmanager
    def readable_worker_errors(self):
        """Explains what one worker sees when another is gone.

        Raises:
            UserError: in place of what TensorFlow raises then.
        """
        if self.workers == 1:
            yield
            return
        from tensorflow import errors

        gone = (
            errors.AbortedError, errors.CanceledError, errors.DeadlineExceededError,
            errors.FailedPreconditionError, errors.InternalError, errors.UnavailableError,
            errors.UnknownError,
        )  # fmt: skip
        try:
            yield
        except gone as error:
            reason = one_line(str(error).split("is aborted by:")[-1], 150)
            raise UserError(
                "another worker of this job is gone, or does not answer. Start the same command on "
                f"all workers again: it goes on from the last checkpoint. ({reason})"
            ) from None

    def compile_predict(self, function, model):
        """`function(images, labels)`, compiled, its batch shared out among this worker's replicas.

        Args:
            function: calls `model` on tensors; returns a nest of tensors `[B, ...]`.
            model: the network.

        Returns:
            function of nests `[B, ...]` to a nest `[B, ...]`; B divisible by `local_replicas`.
        """
        if self.strategy is None:
            return _compile_predict_on_jax(function, model)
        import tensorflow as tf

        compiled = tf.function(function, autograph=False, jit_compile=self.compile)
        if self.local_replicas == 1 and not isinstance(self.strategy, tf.distribute.TPUStrategy):
            return compiled
        step = tf.function(lambda *share: self.strategy.run(function, share), autograph=False)

        def share(context, batch):
            index = context.replica_id_in_sync_group % self.local_replicas
            return tf.nest.map_structure(lambda x: tf.split(x, self.local_replicas)[index], batch)

        def shared(*batch):
            shares = self.strategy.experimental_distribute_values_from_function(
                lambda context: share(context, batch)
            )
            result = step(*shares)
            parts = [self.strategy.experimental_local_results(x) for x in tf.nest.flatten(result)]
            whole = [np.concatenate([np.asarray(x) for x in replicas]) for replicas in parts]
            return tf.nest.pack_sequence_as(result, whole)

        return shared


def make_distribution(runtime):
    """The `Distribution` of a `config.RuntimeConfig`.

    Raises:
        UserError: if this machine, or the Keras backend, cannot do what is asked for.
    """
    return _make(runtime.strategy, runtime.tpu, runtime.devices, runtime.jit_compile)


# A process can join its cluster once.
@functools.cache
def _make(strategy, tpu, devices, jit_compile):
    import keras

    on_jax = keras.backend.backend() == "jax"
    if on_jax != (strategy == "jax") and strategy != "default":
        raise UserError(
            f"runtime.strategy={strategy} does not run on the Keras backend "
            f"{keras.backend.backend()!r}: `jax` needs KERAS_BACKEND=jax, the others tensorflow"
        )
    if on_jax:
        return _jax(devices if strategy == "jax" else 1)
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # On the CPU the graph optimizer costs seconds at the start and saves none in a step.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.get_logger().setLevel(logging.ERROR)  # else a line for each collective operation
    if strategy == "multi_worker_mirrored":
        return _multi_worker(tf)
    if strategy == "tpu":
        on_tpu = _tpu(tf, tpu)
        return Distribution(on_tpu, on_tpu.num_replicas_in_sync)
    if strategy == "mirrored":
        names = _devices(tf, devices)
        return Distribution(tf.distribute.MirroredStrategy(names), len(names))
    return Distribution(tf.distribute.get_strategy(), 1, compile=jit_compile)


def _devices(tf, count):
    """Names of `count` GPUs, or parts of the CPU where there is none; 0 takes all."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU" and count:
        cpu = tf.config.list_physical_devices("CPU")[0]
        with contextlib.suppress(RuntimeError):  # TensorFlow runs already, with what it has
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    if count > len(found):
        raise UserError(f"runtime.devices={count}, but this process has {len(found)} ({kind})")
    return found[: count or None]


def _multi_worker(tf):
    text = os.environ.get("TF_CONFIG")
    try:
        task, cluster = json.loads(text)["task"], json.loads(text)["cluster"]
        addresses = [*cluster.get("chief", []), *cluster["worker"]]
        worker = int(task["index"]) + len(cluster.get("chief", [])) * (task["type"] == "worker")
        addresses[worker]
    except (TypeError, ValueError, KeyError, IndexError):
        raise UserError(
            "runtime.strategy=multi_worker_mirrored reads the environment variable TF_CONFIG, such "
            'as {"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", '
            f'"index": 0}}}}, the index being that of this worker; given {text!r}'
        ) from None
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(f"cannot join the workers {', '.join(addresses)}: {reason}") from None
    return Distribution(strategy, strategy.num_replicas_in_sync, worker, len(addresses))


def _tpu(tf, name):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name or "")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError, OSError) as error:
        reason = one_line(error)
        raise UserError(
            f"no TPU found as {name or 'default'!r} (--tpu takes a name, an address or `local`; "
            f"docs/tpu.md): {reason}"
        ) from None


def _jax(count):
    """All devices of JAX, or `count`; on a CPU that many parts of it."""
    import jax
    import keras

    logging.getLogger("jax").setLevel(logging.WARNING)  # else it tells which backends are absent
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # it only feeds; the memory is for JAX
    if count:
        with contextlib.suppress(RuntimeError):  # JAX runs already, with what it has
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if count > len(found):
        raise UserError(f"runtime.devices={count}, but JAX has {len(found)}")
    found = found[: count or None]
    if len(found) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=found))
    return Distribution(None, len(found))


def _compile_predict_on_jax(function, model):
    import jax
    import keras

    variables = model.variables

    @jax.jit
    def step(values, images, labels):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(images, labels)

    place = jax.numpy.asarray
    if (distribution := keras.distribution.distribution()) is not None:
        mesh = distribution.device_mesh.backend_mesh
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        place = functools.partial(jax.device_put, device=sharding)

    def predict(*batch):
        values = [variable.value for variable in variables]
        return step(values, *jax.tree.map(lambda x: place(np.asarray(x)), batch))

    return predict
