"""The torch.optim shell around a rule that turns one gradient matrix into one update."""

import abc
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from normuon_lens.errors import LensError
from normuon_lens.optim.groups import is_matrix
from normuon_lens.optim.scaling import SCALES

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]

NS_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


class MatrixUpdate(NamedTuple):
    """What a rule makes of one gradient.

    Attributes
    ----------
    update : Tensor of shape (m, n)
        To be subtracted from the weight; weight decay comes on top.
    stages : dict of Tensor of shape (m, n)
        The matrix on its way there, by stage name, in order.
    """

    update: Tensor
    stages: dict[str, Tensor]


class MatrixOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of the optimizers here: parameters, state, checkpoints, the step.

    A subclass says how it updates one matrix (`_update`), which state that takes (`_new_state`)
    and what its hyper-parameters must be (`_check_group`). See `Muon` for what users rely on.
    """

    # On the class, because torch's __getstate__ drops instance attributes: a copied or unpickled
    # optimizer is unobserved.
    stage_observer: Callable[[torch.nn.Parameter, str, Tensor], None] | None = None

    @abc.abstractmethod
    def _update(self, gradient: Tensor, state: State, group: Group) -> MatrixUpdate:
        """Advance `state` in place by a gradient of shape (m, n) and return the update."""

    def _new_state(self, parameter: Tensor) -> State:
        """Zero state of one parameter, in float32 at least: bfloat16 would lose small terms."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return {"momentum_buffer": zeros}

    def _check_group(self, group: Group) -> None:
        """Refuse hyper-parameters out of range with a LensError."""
        for name in ("lr", "weight_decay"):
            in_range = math.isfinite(group[name]) and group[name] >= 0
            refuse_unless(in_range, name, group[name], "finite and at least 0")
        steps, scale, dtype = group["ns_steps"], group["scale"], group["ns_dtype"]
        refuse_unless(isinstance(steps, int) and steps > 0, "ns_steps", steps, "a whole number > 0")
        refuse_unless(scale in SCALES, "scale", scale, f"one of {', '.join(SCALES)}")
        refuse_unless(dtype in NS_DTYPES, "ns_dtype", dtype, "bfloat16, float32, float64 or None")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of matrices and make their state at once.

        Parameters
        ----------
        param_group : dict
            ``"params"`` and any hyper-parameters that differ from the defaults.

        Raises
        ------
        LensError
            For a parameter that is not a real, dense matrix, or a hyper-parameter out of range;
            the optimizer is then as it was before.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for index, parameter in enumerate(group["params"]):
                self._check_matrix(parameter, self._label(len(self.param_groups) - 1, index))
        except LensError:
            self.param_groups.pop()
            raise
        # Not lazily in step: checkpoint code takes a fake step on an optimizer without state.
        for parameter in group["params"]:
            self.state[parameter] = self._new_state(parameter)

    def _check_matrix(self, parameter: Tensor, label: str) -> None:
        if parameter.layout != torch.strided:
            fault = "is sparse"
        elif not parameter.is_floating_point():
            fault = f"is {parameter.dtype}"
        elif not is_matrix(parameter):
            fault = "is not a matrix with at least two rows and two columns"
        else:
            return
        raise LensError(
            f"{type(self).__name__}: {label} of shape {tuple(parameter.shape)} "
            f"{fault}. Give it to AdamW; normuon_lens.optim.split_parameters(model) tells the "
            "two kinds apart."
        )

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
            For a sparse gradient; no matrix has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    label = self._label(number, index)
                    raise LensError(
                        f"{type(self).__name__}: {label} has a sparse gradient. "
                        "Give it to SparseAdam, or make its gradient dense."
                    )
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, parameter.grad, group)
        return loss

    def _step_matrix(self, parameter: torch.nn.Parameter, gradient: Tensor, group: Group) -> None:
        state = self.state[parameter]
        matrix = gradient.reshape(len(gradient), -1).to(state["momentum_buffer"].dtype)
        update, stages = self._update(matrix, state, group)
        if self.stage_observer is not None:
            for stage, seen in (stages | {"update": update}).items():
                self.stage_observer(parameter, stage, seen)
        # W ← W − (ηλW + η̂Ô): summed first, so that a bfloat16 weight is rounded only once and
        # a decay below its resolution is not lost before the update is added.
        decay = float(group["lr"]) * group["weight_decay"]
        parameter.sub_(update.view(parameter.shape).add_(parameter, alpha=decay))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue exactly where a saved optimizer stopped.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of an optimizer of the same class, scale form and parameter shapes.

        Raises
        ------
        LensError
            If it was saved by another optimizer, in the other scale form (whose learning rates
            mean something else), or for parameters of other shapes. Nothing is loaded then.
        """
        # Hooks rather than code around super(): they see what a user's own pre-hook made of the
        # state, and torch casts state to the weight's dtype, which would round float32 state.
        accepted: StateDict = {}

        def accept(_: torch.optim.Optimizer, candidate: StateDict) -> None:
            self._check_saved(candidate)
            accepted.update(candidate)

        def restore(_: torch.optim.Optimizer) -> None:
            for parameter, saved in self._saved_states(accepted):
                state = self._new_state(parameter)
                self.state[parameter] = {key: state[key].copy_(saved[key]) for key in state}

        with (
            self.register_load_state_dict_pre_hook(accept),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _saved_states(self, saved: StateDict) -> Iterator[tuple[Tensor, State]]:
        ids = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        # Not strict: torch itself refuses unequal numbers of parameters, in its own words.
        return ((parameter, saved["state"].get(i, {})) for parameter, i in zip(own, ids))  # noqa: B905

    def _check_saved(self, saved: StateDict) -> None:
        name = type(self).__name__
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=False):
            missing = sorted(self.defaults.keys() - saved_group.keys())
            if missing:
                raise LensError(
                    f"{name}: this state was saved by another optimizer, it lacks "
                    f"{', '.join(missing)}. Load a state that {name} saved."
                )
            if group["scale"] != saved_group["scale"]:
                raise LensError(
                    f'{name}: this state was saved with scale="{saved_group["scale"]}", but this '
                    f'optimizer runs scale="{group["scale"]}", and learning rates of the two do '
                    f'not transfer. Make it with scale="{saved_group["scale"]}".'
                )
        for parameter, saved_state in self._saved_states(saved):
            own = self.state[parameter]
            expected = {key: tuple(value.shape) for key, value in own.items()}
            found = {key: tuple(value.shape) for key, value in saved_state.items()}
            if expected != found:
                raise LensError(
                    f"{name}: the saved state holds {found} where a parameter of shape "
                    f"{tuple(parameter.shape)} needs {expected}. Load the state of this model."
                )


def refuse_unless(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a LensError that names a hyper-parameter, unless its condition holds."""
    if not holds:
        raise LensError(f"{name} must be {expected}, got {value!r}.")
