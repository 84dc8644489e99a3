"""The torch.optim shell around a rule that turns one momentum matrix into one update."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from normuon_lens.errors import LensError
from normuon_lens.optim.groups import is_matrix
from normuon_lens.optim.momentum import advance
from normuon_lens.optim.orthogonalize import COEFFICIENTS
from normuon_lens.optim.owners import ORDERS, assign_owners
from normuon_lens.optim.scaling import SCALES
from normuon_lens.optim.sharded import (
    Column,
    Holding,
    Job,
    Ranks,
    Rounds,
    as_dtensor,
    local,
    members_of,
    missing_rows,
    refusal,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]

NS_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)
WIRE_DTYPES = (None, torch.bfloat16, torch.float32)

# Settings of which every state is: why it cannot be taken over under another. All others are taken
# from the checkpoint.
SETTINGS_OF_A_STATE = {
    "scale": "learning rates of the two do not transfer",
    "granularity": "second moments of the two have different shapes",
    "normalize": "second moments of the two mean different things",
    "only": "the two keep second moments of different matrices",
}

# Settings that a checkpoint may lack, written before they came, and what was done then.
LATER_SETTINGS = {
    "ns_coefficients": "quintic",
    "granularity": "neuron",
    "normalize": "after",
    "only": "all",
    "wire_dtype": None,
    "differentiable": False,  # torch's own, in the defaults of an optimizer that loaded or copied
}

# Stacked at once on a GPU: more gain nothing, for products this large fill it alone.
BATCH_ELEMENTS = 2**26


class MatrixUpdate(NamedTuple):
    """What a rule makes of one momentum matrix.

    Attributes
    ----------
    update : Tensor of shape (m, n), or (batch, m, n)
        To be subtracted from the weight; weight decay comes on top.
    stages : dict of Tensor of the same shape
        The matrix on its way there, by stage name, in order.
    """

    update: Tensor
    stages: dict[str, Tensor]


class MatrixOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of the optimizers here: parameters, state, checkpoints, the step, alone or sharded.

    A subclass says how it updates one matrix (`_update`), which state besides the momentum that
    takes (`_state_columns`) and what its hyper-parameters must be (`_check_group`). See `Muon` for
    what users rely on.
    """

    # On the class, because torch's __getstate__ drops instance attributes: a copied or unpickled
    # optimizer is unobserved, and shares work only where its parameters know their mesh.
    stage_observer: Callable[[torch.nn.Parameter, str, Tensor], None] | None = None
    _process_group: ProcessGroup | None = None
    _owners: str = "round_robin"
    _ranks: Ranks | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        process_group: ProcessGroup | None,
        owners: str,
    ) -> None:
        refuse_unless(owners in ORDERS, "owners", owners, f"one of {', '.join(ORDERS)}")
        self._process_group = process_group
        self._owners = owners
        super().__init__(params, defaults)

    @abc.abstractmethod
    def _update(self, mean: Tensor, state: State, group: Group) -> MatrixUpdate:
        """Return the update for a momentum of shape (m, n), or (batch, m, n).

        `state` holds what `_state_columns` names, of shape (m, width) or (batch, m, width), and is
        advanced in place.
        """

    @abc.abstractmethod
    def _beta(self, group: Group) -> float:
        """Return the decay of the momentum."""

    def _state_columns(self, m: int, n: int, group: Group) -> dict[str, int]:
        """Return the width of each state of a matrix that has one row a neuron."""
        return {}

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        """Zero state of one parameter, in float32 at least: bfloat16 would lose small terms."""
        m, n = _matrix_shape(parameter)
        shapes = {"momentum_buffer": tuple(parameter.shape)}
        for name, width in self._state_columns(m, n, group).items():
            shapes[name] = (m, width)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        sharded = as_dtensor(parameter)
        if sharded is None:
            return {
                name: torch.zeros(shape, dtype=dtype, device=parameter.device)
                for name, shape in shapes.items()
            }
        from torch.distributed.tensor import zeros

        mesh, placements = sharded.device_mesh, sharded.placements
        return {
            name: zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)
            for name, shape in shapes.items()
        }

    def _check_group(self, group: Group) -> None:
        """Refuse hyper-parameters out of range with a LensError."""
        for name in ("lr", "weight_decay"):
            in_range = math.isfinite(group[name]) and group[name] >= 0
            refuse_unless(in_range, name, group[name], "finite and at least 0")
        steps = group["ns_steps"]
        in_range = steps == "exact" or (isinstance(steps, int) and steps > 0)
        refuse_unless(in_range, "ns_steps", steps, 'a whole number > 0 or "exact"')
        for name, choices in (("scale", SCALES), ("ns_coefficients", COEFFICIENTS)):
            refuse_unless(group[name] in choices, name, group[name], f"one of {', '.join(choices)}")
        dtype, wire = group["ns_dtype"], group["wire_dtype"]
        refuse_unless(dtype in NS_DTYPES, "ns_dtype", dtype, "bfloat16, float32, float64 or None")
        refuse_unless(wire in WIRE_DTYPES, "wire_dtype", wire, "bfloat16, float32 or None")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of matrices and make their state at once.

        Parameters
        ----------
        param_group : dict
            ``"params"`` and any hyper-parameters that differ from the defaults.

        Raises
        ------
        LensError
            For a parameter that is not a real, dense matrix or is sharded otherwise than by rows
            over one mesh, or a hyper-parameter out of range; the optimizer is then as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for index, parameter in enumerate(group["params"]):
                self._check_matrix(parameter, self._label(len(self.param_groups) - 1, index))
            self._check_meshes()
        except LensError:
            self.param_groups.pop()
            raise
        # Not lazily in step: checkpoint code takes a fake step on an optimizer without state.
        for parameter in group["params"]:
            self.state[parameter] = self._new_state(parameter, group)

    def _check_matrix(self, parameter: Tensor, label: str) -> None:
        of_shape = f"{type(self).__name__}: {label} of shape {tuple(parameter.shape)}"
        reason = refusal(parameter)
        if reason is not None:
            raise LensError(f"{of_shape} {reason}")
        if parameter.layout != torch.strided:
            fault = "is sparse"
        elif not parameter.is_floating_point():
            fault = f"is {parameter.dtype}"
        elif not is_matrix(parameter):
            fault = "is not a matrix with at least two rows and two columns"
        else:
            return
        raise LensError(
            f"{of_shape} {fault}. Give it to AdamW; normuon_lens.optim.split_parameters(model) "
            "tells the two kinds apart."
        )

    def _check_meshes(self) -> None:
        """Refuse parameters that do not all live on the same ranks."""
        first: tuple[str, object] | None = None
        for label, parameter, _ in self._all():
            sharded = as_dtensor(parameter)
            mesh = None if sharded is None else sharded.device_mesh
            if mesh is not None and self._process_group is not None:
                raise LensError(
                    f"{type(self).__name__}: {label} is a DTensor, which knows its mesh: "
                    "process_group is for plain parameters. Leave it out."
                )
            if first is None:
                first = label, mesh
            elif mesh != first[1]:
                raise LensError(
                    f"{type(self).__name__}: {label} is on {mesh or 'no mesh'}, but {first[0]} is "
                    f"on {first[1] or 'no mesh'}. Make one optimizer for the parameters of each "
                    "mesh, and one for those that are no DTensors."
                )

    def _all(self) -> Iterator[tuple[str, torch.nn.Parameter, Group]]:
        """All parameters, with what messages call them, and their groups."""
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield self._label(number, index), parameter, group

    def _label(self, number: int, index: int) -> str:
        group = self.param_groups[number]
        name = f" ({group['param_names'][index]})" if "param_names" in group else ""
        return f"parameter {index} of group {number}{name}"

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every matrix that has a gradient, once.

        Parameters
        ----------
        closure : callable or None
            Reevaluates the model, computes gradients and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.

        Raises
        ------
        LensError
            For a sparse gradient, or one that is sharded otherwise than its parameter; where the
            work is shared, on all ranks if they are not about to take the same step. No matrix
            has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            ranks = self._sharing()
            if ranks is None:
                self._refuse(self._faults())
                for group in self.param_groups:
                    for batch in _batches([p for p in group["params"] if p.grad is not None]):
                        self._step_batch(batch, group)
            else:
                self._step_shared(ranks)
        return loss

    def sharers(self) -> list[int]:
        """Return the (global) ranks that share the work; none if every process does all of it."""
        first = next(self._all(), None)
        return members_of(first[1], self._process_group) if first else []

    def owners(self) -> dict[torch.nn.Parameter, int]:
        """Return which (global) rank updates each parameter whole; none if every process does all.

        It stays the same while the parameters do, with or without a gradient: that rank alone is
        shown a parameter's stages.
        """
        ranks = self.sharers()
        parameters = [parameter for _, parameter, _ in self._all()]
        return {
            parameters[number]: ranks[owner]
            for numbers in (self._dealt(len(ranks)) if ranks else [])
            for owner, number in enumerate(numbers)
            if number is not None
        }

    def _faults(self) -> list[tuple[str, str]]:
        """Whose gradient cannot be taken, and why."""
        told = [(label, _fault(parameter)) for label, parameter, _ in self._all()]
        return [(label, fault) for label, fault in told if fault is not None]

    def _refuse(self, faults: Sequence[tuple[str, str]]) -> None:
        if faults:
            label, fault = faults[0]
            raise LensError(f"{type(self).__name__}: {label} {fault}")

    def _mean(self, parameter: torch.nn.Parameter, group: Group) -> Tensor:
        """Take the gradient into the momentum; the (rows, n) that is to be orthogonalized."""
        assert parameter.grad is not None
        momentum = _rows(self.state[parameter]["momentum_buffer"])
        gradient = _rows(parameter.grad).to(momentum.dtype)
        return advance(momentum, gradient, beta=self._beta(group), nesterov=group["nesterov"])

    def _step_batch(self, batch: list[torch.nn.Parameter], group: Group) -> None:
        """Update matrices of one shape, all of whose rows are here."""
        for parameter, (update, stages) in zip(batch, self._compute(batch, group), strict=True):
            self._move(parameter, update, group, stages | {"update": update})

    def _compute(self, batch: list[torch.nn.Parameter], group: Group) -> list[MatrixUpdate]:
        means = [self._mean(parameter, group) for parameter in batch]
        states = [self._carried(parameter) for parameter in batch]
        if len(batch) == 1:
            return [self._update(means[0], states[0], group)]
        together = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        update, stages = self._update(torch.stack(means), together, group)
        for name, stacked in together.items():
            for state, advanced in zip(states, stacked, strict=True):
                state[name].copy_(advanced)
        return [
            MatrixUpdate(update[i], {stage: seen[i] for stage, seen in stages.items()})
            for i in range(len(batch))
        ]

    def _carried(self, parameter: torch.nn.Parameter) -> State:
        """State that goes to where a matrix is updated: all but the momentum."""
        state = self.state[parameter]
        return {name: local(state[name]) for name in state if name != "momentum_buffer"}

    def _move(
        self, parameter: torch.nn.Parameter, update: Tensor, group: Group, stages: dict[str, Tensor]
    ) -> None:
        """Show what an update went through, then subtract this rank's rows of it."""
        if self.stage_observer is not None:
            for stage, seen in stages.items():
                self.stage_observer(parameter, stage, seen)
        # W ← W − (ηλW + η̂Ô): summed first, so that a bfloat16 weight is rounded only once and
        # a decay below its resolution is not lost before the update is added.
        decay = float(group["lr"]) * group["weight_decay"]
        weight = local(parameter)
        weight.sub_(update.view(weight.shape).add_(weight, alpha=decay))

    def _sharing(self) -> Ranks | None:
        """Return the ranks among which the work is split; None if this process does all of it."""
        first = next(self._all(), None)  # groups may be empty
        if self._ranks is None and first is not None:
            _, parameter, _ = first
            sharded = as_dtensor(parameter)
            if sharded is not None:
                self._ranks = Ranks.of_mesh(sharded)
            elif self._process_group is not None:
                self._ranks = Ranks.of_group(self._process_group, parameter)
        return self._ranks

    def _step_shared(self, ranks: Ranks) -> None:
        """Update all matrices, each computed by its owner. [paper, Algorithm 2]."""
        ranks.agree(type(self).__name__, list(self._facts()), self._faults())
        jobs = {
            number: self._job(parameter, group, ranks)
            for number, (_, parameter, group) in enumerate(self._all())
            if parameter.grad is not None
        }
        Rounds(ranks.group, ranks.device).carry_out(jobs, self._dealt(len(ranks.members)))

    def _dealt(self, ranks: int) -> list[list[int | None]]:
        """Deal all parameters, also those without a gradient: each keeps its owner."""
        sizes = [parameter.numel() for _, parameter, _ in self._all()]
        return assign_owners(sizes, ranks, self._owners)

    def _facts(self) -> Iterator[tuple[str, str]]:
        """All that ranks must have in common when they take a step."""
        yield "setting", f"the optimizer is {type(self).__name__}"
        yield "setting", f"the optimizer has owners={self._owners!r}"
        yield "setting", f"the optimizer has {len(self.param_groups)} parameter group(s)"
        for number, group in enumerate(self.param_groups):
            # torch gives the defaults of a copied optimizer names of its own, but not its groups.
            for name in self.defaults:
                if name in group:
                    # A tensor would be printed with its device, which differs between ranks.
                    value = float(group[name]) if name == "lr" else group[name]
                    yield "setting", f"group {number} has {name}={value!r}"
        for label, parameter, _ in self._all():
            shape = f"has shape {tuple(parameter.shape)} and is {parameter.dtype}"
            yield "parameter", f"{label} {shape}"
            has = "no gradient" if parameter.grad is None else "a gradient"
            yield "gradient", f"{label} has {has}"

    def _job(self, parameter: torch.nn.Parameter, group: Group, ranks: Ranks) -> Job:
        m, n = _matrix_shape(parameter)
        carried = self._carried(parameter)
        state_dtype = self.state[parameter]["momentum_buffer"].dtype
        wire = group["wire_dtype"] or state_dtype
        columns = [Column(n, wire)]
        columns += [Column(state.shape[1], state.dtype) for state in carried.values()]
        sharded = as_dtensor(parameter)
        if sharded is None:
            holding = Holding.everywhere(m, len(ranks.members))
        else:
            holding = Holding.of(sharded, ranks.members)
        shown: dict[str, Tensor] = {}

        def compute(whole: list[Tensor]) -> list[Tensor]:
            mean, *states = whole
            state = dict(zip(carried, states, strict=True))
            update, stages = self._update(mean.to(state_dtype), state, group)
            update = update.to(wire)
            if self.stage_observer is not None:
                shown.update(stages | {"update": update.to(state_dtype)})
            return [update, *state.values()]

        def receive(rows: list[Tensor]) -> None:
            update, *states = (tensor.to(parameter.device) for tensor in rows)
            update = update.to(state_dtype)
            if len(update) == m:
                shown.setdefault("update", update)
            self._move(parameter, update, group, shown)
            for state, advanced in zip(carried.values(), states, strict=True):
                state.copy_(advanced)

        return Job(
            holding,
            columns,
            send=lambda: [self._mean(parameter, group), *carried.values()],
            compute=compute,
            receive=receive,
        )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue exactly where a saved optimizer stopped.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of an optimizer of the same class, scale form and ablations, for
            parameters of the same shapes, sharded alike. All other settings come from it; those
            that a checkpoint of an older release does not name stay as they are.

        Raises
        ------
        LensError
            If it was saved by another optimizer, in the other scale form (whose learning rates
            mean something else), under another ablation, or for parameters of other shapes or
            sharded otherwise. Nothing is loaded then; but what `torch.distributed.checkpoint`
            has written into weights and state by that time stays there.
        """
        # Hooks rather than code around super(): they see what a user's own pre-hook made of the
        # state, and torch casts state to the weight's dtype, which would round float32 state.
        accepted: StateDict = {}
        before = self.param_groups

        def accept(_: torch.optim.Optimizer, candidate: StateDict) -> None:
            self._check_saved(candidate)
            accepted.update(candidate)

        def restore(_: torch.optim.Optimizer) -> None:
            for group, group_before in zip(self.param_groups, before, strict=True):
                for name in self.defaults:
                    if name in group_before:
                        group.setdefault(name, group_before[name])
            for _label, parameter, group, saved in self._saved_states(accepted):
                state = self._new_state(parameter, group)
                self.state[parameter] = {key: state[key].copy_(saved[key]) for key in state}

        with (
            self.register_load_state_dict_pre_hook(accept),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _saved_states(
        self, saved: StateDict
    ) -> Iterator[tuple[str, torch.nn.Parameter, Group, State]]:
        """All parameters, as `_all` has them, each with its saved state."""
        ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        # Not strict: torch itself refuses unequal numbers of parameters, in its own words.
        return ((*own, saved["state"].get(i, {})) for own, i in zip(self._all(), ids))  # noqa: B905

    def _check_saved(self, saved: StateDict) -> None:
        name = type(self).__name__
        groups = zip(self.param_groups, saved["param_groups"], strict=False)
        for number, (group, saved_group) in enumerate(groups):
            then = LATER_SETTINGS | saved_group
            missing = sorted(self.defaults.keys() - then.keys())
            if missing:
                raise LensError(
                    f"{name}: this state was saved by another optimizer, it lacks "
                    f"{', '.join(missing)}. Load a state that {name} saved."
                )
            for setting, reason in SETTINGS_OF_A_STATE.items():
                if setting in self.defaults and group[setting] != then[setting]:
                    raise LensError(
                        f'{name}: group {number} was saved with {setting}="{then[setting]}", but '
                        f'this optimizer runs {setting}="{group[setting]}", and {reason}. '
                        f'Make it with {setting}="{then[setting]}".'
                    )
        for label, parameter, _, saved_state in self._saved_states(saved):
            own = self.state[parameter]
            expected = {key: tuple(value.shape) for key, value in own.items()}
            found = {key: tuple(value.shape) for key, value in saved_state.items()}
            if expected != found:
                raise LensError(
                    f"{name}: the saved state of {label} holds {found} where a parameter of shape "
                    f"{tuple(parameter.shape)} needs {expected}. Load the state of this model."
                )
            for key in own:
                if _whereabouts(saved_state[key]) != _whereabouts(own[key]):
                    raise LensError(
                        f"{name}: the saved {key} of {label} is {_place(saved_state[key])}, but "
                        f"that of this optimizer is {_place(own[key])}. Load it by "
                        "torch.distributed.checkpoint.state_dict, which shards it anew."
                    )


def refuse_unless(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a LensError that names a hyper-parameter, unless its condition holds."""
    if not holds:
        raise LensError(f"{name} must be {expected}, got {value!r}.")


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    rows, *rest = parameter.shape
    return rows, math.prod(rest)


def _whereabouts(tensor: Tensor) -> tuple[object, object] | None:
    """Return mesh and placements of a DTensor, None for a plain tensor."""
    sharded = as_dtensor(tensor)
    return None if sharded is None else (sharded.device_mesh, sharded.placements)


def _place(tensor: Tensor) -> str:
    sharded = as_dtensor(tensor)
    return "no DTensor" if sharded is None else f"{sharded.placements} on {sharded.device_mesh}"


def _rows(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds, as (rows, n)."""
    part = local(tensor)
    return part.reshape(part.shape[0], math.prod(part.shape[1:]))


def _batches(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Group what a GPU multiplies together; elsewhere, every matrix is on its own."""
    alike: dict[object, list[torch.nn.Parameter]] = {}
    for number, parameter in enumerate(parameters):
        kind: object = number
        if parameter.device.type == "cuda":
            kind = (_matrix_shape(parameter), parameter.dtype, parameter.device)
        alike.setdefault(kind, []).append(parameter)
    batches = []
    for kindred in alike.values():
        most = max(1, BATCH_ELEMENTS // kindred[0].numel())
        batches += [kindred[i : i + most] for i in range(0, len(kindred), most)]
    return batches


def _fault(parameter: torch.nn.Parameter) -> str | None:
    """Say what is wrong with a gradient; None if nothing is."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        return "has a sparse gradient. Give it to SparseAdam, or make its gradient dense."
    if _whereabouts(gradient) != _whereabouts(parameter):
        return (
            f"is {_place(parameter)}, but its gradient is {_place(gradient)}. Reduce the gradient "
            "to the parameter's placement before the step, as fully_shard does."
        )
    sharded, of_gradient = as_dtensor(parameter), as_dtensor(gradient)
    if sharded is not None and of_gradient is not None:
        here, of_it = missing_rows(sharded), missing_rows(of_gradient)
        return here or (of_it and f"has a gradient that {of_it}")
    return None
