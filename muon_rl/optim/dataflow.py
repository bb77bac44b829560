"""Which layers feed which: networks run on tokens, which remember the layers they come from."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from tensordict import unravel_key
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn, random
from torch._C import _disabled_torch_function_impl
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_Layers = frozenset[nn.Module]
_ITEMS = 16  # items of a token that a forward walks through
_WIDTHS_IN = ("in_features", "in_channels", "input_size", "embed_dim", "in1_features")
_WIDTHS_OUT = ("out_features", "out_channels", "hidden_size", "embed_dim")
_IN_PLACE = re.compile(r"(?!and_|or_).*[^_]_|__set(item)?__|__i(?!nt|ndex|nvert)\w+__")
_ONE_AT_A_TIME = threading.RLock()


class Flow:
    """The graph of the layers of some networks.

    Each ``forward`` runs on tokens instead of tensors: no batch is needed, and the network stays as
    it was. Where one cannot run so, the children are taken for a chain in the order of
    registration; those of a module without one, as a ``ModuleList``, are parallel.

    Args:
        networks: traced one after the other, each from inputs of its own.
        kinds: the classes of layers; :class:`torch.nn.MultiheadAttention` feeds its ``out_proj``.
    """

    def __init__(self, networks: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
        self._kinds = kinds
        self._fed_by: dict[nn.Module, set[nn.Module]] = {}
        for network in networks:
            self._run = _Run(self._feed, self._layers(network))
            with _calls_go_to(self._call), self._run:
                self._call(network)
                for part in network.modules():  # what the forward leaves out stands alone
                    if (layers := self._layers(part)) and self._fed_by.keys().isdisjoint(layers):
                        self._call(part)

    def around(self, layer: Any) -> tuple[bool, bool]:
        """Tell whether other layers are upstream, and whether any are downstream."""
        return bool(self._fed_by.get(layer)), any(layer in fed for fed in self._fed_by.values())

    def _layers(self, module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if isinstance(part, self._kinds)]

    def _feed(self, sources: _Layers, *layers: nn.Module) -> _Layers:
        """Record that layers are fed, and return them: the sources of what they give."""
        for layer in layers:  # called again, as in a recurrence, one does not stand behind itself
            behind = {s for s in sources if layer in self._fed_by and layer in self._upstream(s)}
            self._fed_by.setdefault(layer, set()).update(sources - behind)
        return _Layers(layers)

    def _upstream(self, layer: nn.Module) -> set[nn.Module]:
        """Return a layer and all that stand before it."""
        found = [layer]
        for one in found:  # which grows on the way
            found += self._fed_by[one].difference(found)
        return set(found)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what a module gives for tokens; without arguments, for inputs of its own."""
        module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
        layers, given = self._layers(module), self._run.token_of(args, kwargs)
        if isinstance(module, self._kinds):
            if isinstance(module, nn.MultiheadAttention):
                given.sources = self._feed(given.sources, layers.pop(0))
            return _Token(self._feed(given.sources, *layers), self._run)
        if isinstance(module, TensorDictModuleBase):
            return self._call_by_keys(module, args, kwargs)
        if not layers:
            return given
        calls = [(args, kwargs)] if args or kwargs else [*self._inputs(module.forward)]
        return self._forward(module, module.forward, calls)

    def _inputs(self, forward: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        """Yield a token for each argument without a default, then one for each argument."""
        try:
            arguments = list(inspect.signature(forward).parameters.values())
        except ValueError:  # a builtin may tell none
            arguments = []
        for given in ([a for a in arguments if a.default is a.empty], arguments):
            positional = tuple(self._run.token_of() for a in given if a.kind < a.KEYWORD_ONLY)
            named = {a.name: self._run.token_of() for a in given if a.kind == a.KEYWORD_ONLY}
            yield positional, named

    def _call_by_keys(self, module: TensorDictModuleBase, args: Any, kwargs: Any) -> _Keys:
        """Return the tensordict after a module has read its in_keys and written its out_keys."""
        data = args[0] if args else kwargs.get("tensordict")
        if not isinstance(data, _Keys):  # tensors, or a tensordict whose keys are not known
            data = _Keys(self._run.token_of(args, kwargs).sources, self._run)
        if isinstance(module, TensorDictSequential):
            for part in module.module._modules.values():
                self._call(part, data)
            return data
        values = tuple(data.get(key) for key in module.in_keys)
        given: Any = self._run.token_of(values)
        if isinstance(module, TensorDictModule) and self._layers(module):
            named = dict(zip(module._kwargs or (), values, strict=False))
            call = ((() if named else values,), named)
            given = self._forward(module, module._call_module, [call])
        elif self._layers(module):  # without @dispatch, which would look for tensors
            forward = inspect.unwrap(type(module).forward).__get__(module)
            given = self._forward(module, forward, [((data,), {})])
        if isinstance(given, (dict, _Keys)):
            given = [given.get(key) for key in module.out_keys]
        elif not isinstance(given, (tuple, list)) or len(given) != len(module.out_keys):
            given = [self._run.token_of(given) for _ in module.out_keys]
        return data.update(zip(module.out_keys, given, strict=True))

    def _forward(self, module: nn.Module, forward: Callable[..., Any], calls: list[Any]) -> Any:
        """Return what ``forward`` gives, run until it succeeds and reaches every layer."""
        run, decisions, results = self._run, 0, list[Any]()
        # What hangs on a token, as in `if x.dim() == 1`, is decided both ways, one in each run.
        for (args, kwargs), guess in product(calls, (False, True)):
            if guess and not decisions:
                continue
            attributes, buffers = dict(vars(module)), dict(module._buffers)
            outer, run.guess, run.decisions = (run.guess, run.decisions), guess, 0
            try:
                results.append(forward(*args, **kwargs))
            except Exception as error:  # whatever a forward raises that expects tensors
                if isinstance(error, NotImplementedError) and _is_own(error):  # it has none
                    return run.token_of(*map(self._call, module.children()))
            finally:
                decisions, (run.guess, run.decisions) = run.decisions, outer
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.update(buffers)
            if results and self._fed_by.keys() >= set(self._layers(module)):
                break
        if results:
            return results[0] if len(results) == 1 else run.token_of(results)
        alone = len(args) == 1 and isinstance(args[0], _Token) and not kwargs
        return self._chain(module, args[0] if alone else run.token_of(args, kwargs))

    def _chain(self, module: nn.Module, source: Any) -> Any:
        """Return what the children give one after the other."""
        before, given, last = source, source, ([0], [0])
        for child in module._modules.values():
            if child is None or not (layers := self._layers(child)):
                continue
            into = [getattr(layers[0], name) for name in _WIDTHS_IN if hasattr(layers[0], name)]
            out = [getattr(layers[-1], name) for name in _WIDTHS_OUT if hasattr(layers[-1], name)]
            # It cannot take what the child before gives, but what that one takes.
            beside = into[:1] == last[0][:1] != last[1][:1]
            last, before = (into, out), before if beside else given
            listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            result = self._chain(child, before) if listed else self._call(child, before)
            given = self._run.token_of(given, result) if beside else result
        return given


def _is_own(error: Exception) -> bool:
    """Tell whether the function that was called raised an error itself, and nothing it calls."""
    called = error.__traceback__ and error.__traceback__.tb_next
    return called is not None and called.tb_next is None


@contextmanager
def _calls_go_to(answer: Callable[..., Any]) -> Iterator[None]:
    """Let ``answer`` stand for each call of a module by this thread, silently, without seeds."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (answer if threading.get_ident() == thread else original)(module, *args, **kwargs)

    with _ONE_AT_A_TIME, warnings.catch_warnings(), random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        thread, original = threading.get_ident(), nn.Module.__call__
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


class _Run(TorchFunctionMode):
    """Makes tokens and answers for every operation that meets one, as a tracer of torch.fx does."""

    def __init__(self, feed: Callable[..., _Layers], layers: list[nn.Module]) -> None:
        super().__init__()
        self._feed = feed
        self._owners = {id(p): layer for layer in layers for p in layer.parameters(recurse=False)}
        self.trace_asserts, self.guess, self.decisions = False, False, 0

    def token_of(self, *values: Any) -> _Token:
        """Return a token that comes from all layers that the values, however nested, come from."""
        tokens = (leaf for leaf in tree_leaves(values) if isinstance(leaf, _Token))
        return _Token(_Layers().union(*(token.sources for token in tokens)), self)

    def to_bool(self, token: Proxy) -> bool:
        self.decisions += 1
        if self.decisions > 1000:
            raise RuntimeError("This loop may be endless.")
        return self.guess

    def iter(self, token: Proxy) -> Iterator[_Token]:
        return iter([self.token_of(token) for _ in range(_ITEMS)])

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, **_: Any) -> Any:
        tokens = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Token)]
        if all(isinstance(token, _Size) for token in tokens):
            return _Size(_Layers(), self)
        return self.__torch_function__(target, (), args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the token of an operation's result, or compute it where it meets no token."""
        token, leaves = self.token_of(args, kwargs), tree_leaves((args, kwargs))
        if _IN_PLACE.fullmatch(getattr(func, "__name__", func)):  # it may change a buffer
            if isinstance(args[0], _Token):
                args[0].sources |= token.sources
            elif token.sources:
                raise TypeError("A tensor cannot remember what was written into it.")
            return args[0]
        if not any(isinstance(leaf, _Token) for leaf in leaves):
            return func(*args, **(kwargs or {}))
        # A layer's weight without the layer's call, as in F.linear(x, layer.weight).
        if layers := {self._owners[id(leaf)] for leaf in leaves if id(leaf) in self._owners}:
            token.sources = self._feed(token.sources, *layers)
        return token


class _Token(Proxy):
    """Stands for a tensor, or for its attribute ``name``, with the layers nearest upstream."""

    def __init__(self, sources: _Layers, run: Any, owner: Any = None, name: str = "") -> None:
        self.sources, self._owner, self._name = sources, owner, name
        self.tracer: Any = run

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "size", "ndim", "dim", "numel", "batch_size", "batch_dims"):
            return _Size(_Layers(), self.tracer)
        told = _Layers() if name in ("dtype", "device") else self.sources
        return _Token(told, self.tracer, self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._owner, _Keys):
            return self._owner  # reshaped, cloned or moved, it keeps its keys
        owner = self if self._owner is None else self._owner
        return self.tracer.create_proxy("call", self._name, (owner, *args), kwargs)

    def __setitem__(self, key: Any, value: Any) -> Any:
        self.tracer.create_proxy("call", "__setitem__", (self, value), {})

    def __index__(self) -> int:
        return 1

    __len__ = __index__
    __repr__ = object.__repr__

    def keys(self) -> Any:
        return self


class _Size(_Token, int):  # type: ignore[misc]
    """Stands for a shape or a number in it, an integer for torch, which tells nothing of layers."""

    __torch_function__: Any = _disabled_torch_function_impl

    def __new__(cls, *_: Any) -> _Size:
        return super().__new__(cls, 1)


class _Keys(_Token):
    """Stands for a tensordict: a value for each key written, its first sources for any other."""

    def __init__(self, sources: _Layers, run: _Run) -> None:
        super().__init__(sources, run)
        self._rest, self._entries = _Token(sources, run), dict[Any, Any]()

    def get(self, key: Any, *_: Any, **__: Any) -> Any:
        key = unravel_key(key)
        inside = [value for path, value in self._entries.items() if path[:1] == (key,)]
        return self._entries.get(key, self.tracer.token_of(self._rest, inside))

    def set(self, key: Any, value: Any, **_: Any) -> _Keys:
        self._entries[unravel_key(key)] = value
        self.sources |= self.tracer.token_of(value).sources
        return self

    def update(self, other: Any, **_: Any) -> _Keys:
        for key, value in dict(other._entries if isinstance(other, _Keys) else other).items():
            self.set(key, value)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self.get(key) if isinstance(key, (str, tuple)) else self

    __setitem__ = set
