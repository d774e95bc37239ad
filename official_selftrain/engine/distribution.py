"""The devices and workers that share a training or labeling, with `tf.distribute` or on JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.types import Tensor

if TYPE_CHECKING:
    import keras

    from official_selftrain.config import RuntimeConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The devices of all workers. Each of them, a replica, computes a part of every batch.

    Attributes:
        strategy: a `tf.distribute.Strategy`.
        replicas: number of devices of all workers together.
        worker: index of this process. Worker 0 is the chief, the only one that writes to the run
            folder.
        workers: number of worker processes.
        compile: whether `tf.function` compiles steps with XLA.
        supports_micro_batches: whether `GradientTrainer.accumulate_step` exists.
    """

    strategy: Any
    replicas: int
    worker: int = 0
    workers: int = 1
    compile: bool = False

    supports_micro_batches = True

    @property
    def chief(self) -> bool:
        """Whether this process is the chief."""
        return self.worker == 0

    @property
    def local_replicas(self) -> int:
        """Number of devices of this worker."""
        return self.replicas // self.workers

    def scope(self) -> contextlib.AbstractContextManager:
        """Context in which variables must be created."""
        return self.strategy.scope()

    def dataset(self, function: Callable[[Any], Any]) -> Any:
        """The input of this worker's replicas.

        Args:
            function: takes a `tf.distribute.InputContext`, or None for the whole input, and returns
                a `tf.data.Dataset`.

        Returns:
            The data set, or a distributed one.
        """
        if self.replicas == 1:
            return function(None)
        return self.strategy.distribute_datasets_from_function(function)

    def local(self, value: Tensor) -> np.ndarray:
        """Joins the parts of a value that lie on this worker's replicas.

        Args:
            value: `[b, ...]` on each replica.

        Returns:
            `[local_replicas * b, ...]`, in the order of the replicas.
        """
        parts = self.strategy.experimental_local_results(value)
        return np.concatenate([np.asarray(part) for part in parts])

    def gather(self, value: T) -> list[T]:
        """Gathers one picklable value per worker and returns the list on every worker.

        Collective: all workers must call it equally often, and each blocks until the last one
        arrives.

        Raises:
            UserError: if another worker has died.
        """
        if self.workers == 1:
            return [value]
        # Collectives move numbers only: the bytes travel as int32, padded to a multiple of 4, and
        # their lengths are gathered first to cut them apart again.
        data = pickle.dumps(value)
        with self.readable_worker_errors():
            sizes = self._gather(np.array([len(data)], "int32"))
            everything = self._gather(np.frombuffer(data + bytes(-len(data) % 4), "int32"))
        lengths = (sizes + 3) // 4
        ends = np.cumsum(lengths)
        starts = ends - lengths
        parts = [
            everything[start:end].tobytes()[:size]
            for start, end, size in zip(starts, ends, sizes, strict=True)
        ]
        # All replicas of a worker have sent its value; one of them is enough.
        return [pickle.loads(part) for part in parts[:: self.local_replicas]]

    def _gather(self, numbers: np.ndarray) -> np.ndarray:
        """Concatenates the int32 `[n]` of all replicas."""
        # Every replica gets the same result.
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

    def barrier(self) -> None:
        """Blocks until every worker has called it."""
        self.gather(None)

    def on_chief_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on the chief, then on the other workers, and returns its result."""
        if not self.chief:
            self.barrier()
            return function()
        result = function()
        self.barrier()
        return result

    @contextlib.contextmanager
    def readable_worker_errors(self) -> Iterator[None]:
        """Turns TensorFlow's collective errors into one readable message when a worker has died.

        Raises:
            UserError: instead of TensorFlow's error.
        """
        if self.workers == 1:
            yield
            return
        from tensorflow import errors

        # Which one TensorFlow raises depends on the operation that was interrupted.
        gone = (
            errors.AbortedError, errors.CancelledError, errors.DeadlineExceededError,
            errors.FailedPreconditionError, errors.InternalError, errors.UnavailableError,
            errors.UnknownError,
        )  # fmt: skip
        try:
            yield
        except gone as error:
            # TensorFlow nests its messages; the cause comes last.
            reason = one_line(str(error).split("is aborted by:")[-1], 150)
            raise UserError(
                "another worker of this job has died or does not answer. Start the same command on "
                f"all workers again; it resumes from the last checkpoint. ({reason})"
            ) from None

    def compile_predict(
        self, function: Callable[[Any, Any], Any], model: keras.Model
    ) -> Callable[[Any, Any], Any]:
        """Compiles a prediction and divides its batches among this worker's replicas.

        Args:
            function: takes (images, labels), nests of tensors `[B, ...]`, calls `model`, and
                returns a nest of tensors `[B, ...]`.
            model: the network.

        Returns:
            `function`, compiled. B must be divisible by `local_replicas`.
        """
        import tensorflow as tf

        compiled = tf.function(function, autograph=False, jit_compile=self.compile)
        # A TPU only runs what is called through `strategy.run`.
        if self.local_replicas == 1 and not isinstance(self.strategy, tf.distribute.TPUStrategy):
            return compiled
        step = tf.function(lambda *part: self.strategy.run(function, part), autograph=False)

        def part_of(context, batch):
            index = context.replica_id_in_sync_group % self.local_replicas
            return tf.nest.map_structure(lambda x: tf.split(x, self.local_replicas)[index], batch)

        def predict(*batch):
            parts = self.strategy.experimental_distribute_values_from_function(
                lambda context: part_of(context, batch)
            )
            return tf.nest.map_structure(self.local, step(*parts))

        return predict


class JaxDistribution(Distribution):
    """Devices of JAX on this machine.

    JAX runs one program on all of them, and its arrays know where their parts lie.

    Args:
        replicas: number of devices.
    """

    supports_micro_batches = False

    def __init__(self, replicas: int = 1):
        super().__init__(strategy=None, replicas=replicas)

    def scope(self) -> contextlib.AbstractContextManager:
        """A context without effect."""
        return contextlib.nullcontext()

    def dataset(self, function: Callable[[Any], Any]) -> Any:
        """The whole input; Keras divides each batch among the devices."""
        return function(None)

    def local(self, value: Tensor) -> np.ndarray:
        """The value `[B, ...]` as a NumPy array."""
        return np.asarray(value)

    def compile_predict(
        self, function: Callable[[Any, Any], Any], model: keras.Model
    ) -> Callable[[Any, Any], Any]:
        """Compiles a prediction; see `Distribution.compile_predict`."""
        return _compile_predict_on_jax(function, model)


def make_distribution(runtime: RuntimeConfig) -> Distribution:
    """The `Distribution` of a `config.RuntimeConfig`; the same object for the same settings.

    Raises:
        UserError: if this machine or the Keras backend does not support the settings.
    """
    return _make(runtime.strategy, runtime.tpu, runtime.devices, runtime.jit_compile)


@functools.cache  # because a process can join its cluster only once
def _make(strategy: str, tpu: str | None, devices: int, jit_compile: bool) -> Distribution:
    import keras

    on_jax = keras.backend.backend() == "jax"
    if on_jax != (strategy == "jax") and strategy != "default":
        raise UserError(
            f"runtime.strategy={strategy} does not run on the Keras backend "
            f"{keras.backend.backend()!r}: `jax` needs the environment variable KERAS_BACKEND=jax, "
            "all other strategies need KERAS_BACKEND=tensorflow"
        )
    if on_jax:
        return _jax(devices if strategy == "jax" else 1)
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # On a CPU the graph optimizer takes seconds at startup and makes no step faster.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.get_logger().setLevel(logging.ERROR)  # otherwise it logs every collective operation
    if strategy == "multi_worker_mirrored":
        return _multi_worker(tf)
    if strategy == "tpu":
        on_tpu = _tpu(tf, tpu)
        return Distribution(on_tpu, on_tpu.num_replicas_in_sync)
    if strategy == "mirrored":
        names = _devices(tf, devices)
        return Distribution(tf.distribute.MirroredStrategy(names), len(names))
    return Distribution(tf.distribute.get_strategy(), 1, compile=jit_compile)


def _devices(tf: Any, count: int) -> list[str]:
    """Names of `count` GPUs, or of logical CPU devices if there is no GPU; 0 takes all."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU" and count:
        cpu = tf.config.list_physical_devices("CPU")[0]
        with contextlib.suppress(RuntimeError):  # TensorFlow has been initialized already
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    if count > len(found):
        raise UserError(
            f"runtime.devices={count}, but this process has only {len(found)} ({kind}); choose at "
            f"most {len(found)}"
        )
    return found[: count or None]


def _multi_worker(tf: Any) -> Distribution:
    """Joins the cluster that the environment variable TF_CONFIG describes."""
    text: Any = os.environ.get("TF_CONFIG")  # None is reported as such below
    try:
        task, cluster = json.loads(text)["task"], json.loads(text)["cluster"]
        addresses = [*cluster.get("chief", []), *cluster["worker"]]
        worker = int(task["index"]) + len(cluster.get("chief", [])) * (task["type"] == "worker")
        addresses[worker]
    except (TypeError, ValueError, KeyError, IndexError):
        raise UserError(
            "runtime.strategy=multi_worker_mirrored needs the environment variable TF_CONFIG, such "
            'as {"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", '
            f'"index": 0}}}}, where index is the number of this worker; given {text!r}'
        ) from None
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(f"cannot connect to the workers {', '.join(addresses)}: {reason}") from None
    return Distribution(strategy, strategy.num_replicas_in_sync, worker, len(addresses))


def _tpu(tf: Any, name: str | None) -> Any:
    """The `tf.distribute.TPUStrategy` of a TPU."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name or "")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError, OSError) as error:
        reason = one_line(error)
        raise UserError(
            f"cannot connect to the TPU {name or 'default'!r} (--tpu takes a name, an address, or "
            f"`local`; see docs/tpu.md): {reason}"
        ) from None


def _jax(count: int) -> JaxDistribution:
    """The first `count` devices of JAX, or all if 0; on a CPU, that many logical devices."""
    import jax
    import keras

    logging.getLogger("jax").setLevel(logging.WARNING)  # otherwise it logs missing backends
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # it only reads data; JAX needs the memory
    if count:
        with contextlib.suppress(RuntimeError):  # JAX has been initialized already
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if count > len(found):
        raise UserError(
            f"runtime.devices={count}, but JAX has only {len(found)}; choose at most {len(found)}"
        )
    found = found[: count or None]
    if len(found) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=found))
    return JaxDistribution(len(found))


def _compile_predict_on_jax(
    function: Callable[[Any, Any], Any], model: keras.Model
) -> Callable[[Any, Any], Any]:
    import jax
    import keras

    variables = model.variables

    # The weights are arguments: as constants, they would be compiled into the program and could
    # not change between evaluations.
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
