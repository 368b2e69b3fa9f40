"""Every branch on a JAX version and every name that JAX does not promise to keep.

Supported: JAX 0.10 and newer. Each entry says why it is needed and what it was
checked with; nothing elsewhere in the package touches a private name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# See `check_floats_of`.
from jax._src import checkify

# The error that lax raises for shardings in types; it has no public name.
from jax._src.core import ShardingTypeError as ShardingTypeError
from jax._src.dispatch import prim_requires_devices_during_lowering

# The tables of lowering rules; jax.interpreters.mlir only adds to them.
from jax._src.interpreters import mlir as private_mlir

# Turns a PrecisionLike and the default_matmul_precision in force into what a
# convolution's lowering takes; jax.lax has no public spelling of it.
from jax._src.lax.lax import canonicalize_precision as canonicalize_precision

# Reads an `out_sharding` argument: a specification gets the mesh in force, a mesh its
# abstract form.
from jax._src.sharding_impls import canonicalize_sharding as canonicalize_sharding

# See `partition_spec`.
from jax._src.sharding_impls import parse_flatten_op_sharding

# See `forward_mark`.
from jax._src.xla_metadata_lib import current_xla_metadata
from jax.experimental import jet
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import ad, mlir

try:  # what comparing symbolic sizes raises; JAX 0.10.0 has it elsewhere
    from jax.errors import InconclusiveDimensionOperation as InconclusiveDimensionOperation
except ImportError:
    from jax.extend.core import InconclusiveDimensionOperation as InconclusiveDimensionOperation


def set_bilinear_jet_rule(primitive: Any) -> None:
    """Gives a bilinear primitive a rule in `jax.experimental.jet`, that of lax's convolution.

    jet has no public way to add one, and its product rule is a private name.
    """
    rules: dict[Any, Any] = jet.jet_rules
    rules[primitive] = functools.partial(jet._bilinear_taylor_rule, primitive)


def set_composed_jet_rule(primitive: Any, steps: Callable[..., Any]) -> None:
    """Lets jet take a primitive for the function that writes it out."""

    def rule(primals: Any, series: Any, **params: Any) -> Any:
        function = functools.partial(steps, **params)
        # Inside a rule coefficients are as jet keeps them, without their factorials.
        return jet.jet(function, primals, series, factorial_scaled=False)

    rules: dict[Any, Any] = jet.jet_rules
    rules[primitive] = rule


def check_floats_of(primitive: Any) -> None:
    """Has `checkify.float_checks` look at a primitive's results, as at those of lax's convolution.

    There is no public way to ask for it.
    """
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes (inside `shard_map`) over which an array varies.

    `aval.manual_axis_type` since JAX 0.10 (`aval.vma` before it).
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def match_varying_axes(*arrays: Any) -> tuple[Any, ...]:
    """Casts arrays to vary over the same manual axes, as every lax function does.

    A primitive's operands must agree; the cast's transpose is the psum that makes the
    cotangent of a replicated operand right.
    """
    axes = [varying_axes(x) for x in arrays]
    union = frozenset().union(*axes)
    return tuple(
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    )


def has_explicit_sharding(*avals: Any) -> bool:
    """Whether any of these types lives on a mesh with explicit axes (sharding in types)."""
    for aval in avals:
        mesh = aval.sharding.mesh
        if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
            return True
    return False


def explicit_sharding(aval: Any) -> Any:
    """The sharding in a type, None where no axis of its mesh is explicit."""
    return aval.sharding if has_explicit_sharding(aval) else None


def constrain(lowering_context: Any, value: Any, aval: Any) -> Any:
    """The lowered value with the sharding of its type as a constraint.

    Each of lax's lowering rules ends with this; `jax.interpreters.mlir` does not export it.
    """
    return private_mlir.lower_with_sharding_in_types(lowering_context, value, aval)


def partitioned_automatically(lowering_context: Any) -> bool:
    """Whether XLA's partitioner will split the module being lowered over devices.

    It cannot look inside a custom call and would gather the operands on every device.
    `ModuleContext.axis_context` is not documented: a sharding context counts its
    devices, a `shard_map` context lists the axes that are manual.
    """
    axis_context = lowering_context.module_context.axis_context
    devices = getattr(axis_context, "num_devices", None)
    if devices is not None:
        return bool(devices > 1)
    mesh = getattr(axis_context, "mesh", None)
    manual: frozenset[str] = getattr(axis_context, "manual_axes", frozenset())
    if mesh is None:
        return False
    return any(size > 1 for name, size in dict(mesh.shape).items() if name not in manual)


def is_exported(lowering_context: Any) -> bool:
    """Whether `jax.export` asks for this lowering, by the undocumented `for_export`."""
    return bool(lowering_context.module_context.lowering_parameters.for_export)


def no_custom_partitioning(lowering_context: Any) -> str | None:
    """Why a module that XLA splits over devices cannot hold a `custom_partitioning`, or None.

    Undocumented but needed: of the sharding context its `abstract_mesh`, which names the
    axes, and its `device_assignment`, which is there for the primitives of
    `requires_devices_during_lowering`.
    """
    context = lowering_context.module_context
    if is_exported(lowering_context):
        return (
            "a program for several devices that XLA partitions is exported, which "
            "implementation='xla' permits"
        )
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        # A Shardy rule without Shardy aborts the process (JAX 0.10).
        return "XLA's older partitioner, GSPMD, splits the program"
    if getattr(context.axis_context, "num_devices", None) is None:
        return "some axes of the mesh are manual and others are not"
    if context.axis_context.device_assignment is None:
        return "the program is lowered before its devices are known"
    if context.axis_context.abstract_mesh is None:
        return "the program's devices form no mesh"
    return None


def without_mesh() -> Any:
    """A context without the mesh that the user has set (`jax.set_mesh`), for tracing."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def annotate(value: Any, name: str, text: str) -> None:
    """Attaches a text to the operation that makes a lowered value, which XLA ignores.

    As `jax.experimental.xla_metadata` does it, which reaches no operation of a lowering rule.
    """
    ir = mlir.ir
    attribute = ir.DictAttr.get({name: ir.StringAttr.get(text)})
    value.owner.attributes["mhlo.frontend_attributes"] = attribute


def partition_spec(sharding: Any, mesh: jax.sharding.Mesh) -> jax.sharding.PartitionSpec | None:
    """What a sharding of XLA's says in axes of a mesh, None if whole axes cannot say it.

    JAX does this itself for the callback of a `custom_partitioning`, but raises: an
    IndivisibleError (a ValueError), or AssertionErrors and others of its parser.
    `GSPMDSharding` keeps the sharding under a private name.
    """
    if sharding is None:  # left open
        return jax.sharding.PartitionSpec()
    try:
        return parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]
    except (AssertionError, KeyError, NotImplementedError, StopIteration, ValueError):
        return None


def requires_devices_during_lowering(primitive: Any) -> None:
    """Has JAX tell the primitive's lowering which devices the program is for.

    A primitive whose lowering makes a `custom_partitioning` call must be in this set, or
    the call finds no devices.
    """
    prim_requires_devices_during_lowering.add(primitive)


@functools.cache
def lax_transpose_rules() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The transpose rules of the convolution that lax registers, for lhs and for rhs.

    `ad.defbilinear` keeps them as the arguments of a partial. Must be called before
    anything is registered in their place.
    """
    registered: Any = ad.primitive_transposes[lax.conv_general_dilated_p]
    lhs_rule, rhs_rule = registered.args
    return lhs_rule, rhs_rule


@functools.cache
def lax_lowering(primitive: Any, platform: str) -> Callable[..., Any]:
    """The lowering rule that lax registers for a primitive on a platform.

    `mlir.register_lowering` has no inverse: the tables are those it fills. Must be called
    before anything is registered in their place.
    """
    entry = private_mlir._platform_specific_lowerings[platform].get(primitive)
    return (entry or private_mlir._lowerings[primitive]).rule


def mark_forward(value: str | None) -> Any:
    """A context that marks the convolutions of lax which are traced in it; None for no mark.

    As metadata for XLA, the one thing that stays with an equation through derivatives and
    batching and is no parameter of its primitive. XLA ignores it.
    """
    return set_xla_metadata(convgrad_forward=value)


def forward_mark() -> str | None:
    """The mark of what is traced, None without one: in a transpose rule, of its equation."""
    return (current_xla_metadata() or {}).get("convgrad_forward")


def forward_mark_of(lowering_context: Any) -> str | None:
    """The mark of the equation that is lowered, None without one.

    By the undocumented `LoweringRuleContext.jaxpr_eqn_ctx`.
    """
    context = getattr(lowering_context, "jaxpr_eqn_ctx", None)
    metadata = getattr(context, "xla_metadata", None) or {}
    mark: str | None = metadata.get("convgrad_forward")
    return mark


def with_lowering_cache_of_its_own(lowering_context: Any) -> Any:
    """The context, whose equations share no lowered code with the rest of the module.

    Within one module JAX lowers equal equations once, by a key that knows nothing of user
    contexts (`ModuleContext.lowering_cache`).
    """
    module_context = lowering_context.module_context.replace(lowering_cache={})
    return lowering_context.replace(module_context=module_context)


def set_for_process(user_context: Any, value: Any) -> None:
    """Sets a user context for every thread that is not inside a `with` of it.

    JAX 0.10.0 has `set_global` only on the configuration value behind the context.
    """
    holder = user_context if hasattr(user_context, "set_global") else user_context._obj
    holder.set_global(value)
