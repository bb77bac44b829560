"""PPO on jumanji's Snake in JAX, all of a rollout and its updates in one jitted function.

The other side of ``ppo_throughput.py``'s comparison, for an interpreter that has ``jax``,
``jumanji`` and ``optax``. As in PureJaxRL, a scan plays the games, another one goes backwards for
the advantages, and a third one makes the updates of all minibatches of all epochs. Network, boards
and numbers are those of ``ppo_snake_adam_small``: 128 games of 6 x 6, 4096 steps a rollout, 3
epochs of 8 minibatches, two blocks of width 64 on patches of 2 x 2, of which the last one computes
only the row that is read, that of the head. What differs is jumanji's: a board is five planes of
floats, which a linear layer makes 16 features a cell where tokens have an embedding; a snake begins
with one cell anywhere; 500 steps without an end count as an end.

    python benchmarks/ppo_jax.py learn 150000       # the mean score over frames
    python benchmarks/ppo_jax.py parts 20           # milliseconds of a rollout and its updates
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jumanji.environments import Snake
from jumanji.wrappers import VmapAutoResetWrapper

GAMES, SIZE, STEPS, EPOCHS, MINIBATCHES = 128, 6, 4096, 3, 8
PATCH, CELL, WIDTH, LAYERS, HEADS, HIDDEN, ACTIONS = 2, 16, 64, 2, 4, 64, 4
ROWS = (SIZE // PATCH) ** 2
HEAD_PLANE, PLANES = 1, 5
RATE, GAMMA, LMBDA, CLIP, ENTROPY, VALUE, MAX_NORM = 1e-3, 0.99, 0.95, 0.2, 0.01, 0.5, 0.5
FOOD, DEATH, STEP = 1.0, -1.0, -0.001

Parameters = dict[str, Any]


# --------------------------------------------------------------------------------- the network


def linear(key: Array, inputs: int, outputs: int, bias: bool = True) -> Parameters:
    """Return a layer with uniform weights of torch's default size."""
    keys, bound = jax.random.split(key), inputs**-0.5
    layer = {"weight": jax.random.uniform(keys[0], (inputs, outputs), minval=-bound, maxval=bound)}
    if bias:
        layer["bias"] = jax.random.uniform(keys[1], (outputs,), minval=-bound, maxval=bound)
    return layer


def apply(layer: Parameters, x: Array) -> Array:
    """Return a linear layer's output."""
    y = x @ layer["weight"]
    return y + layer["bias"] if "bias" in layer else y


def normal(layer: Parameters, x: Array) -> Array:
    """Return rows with mean 0 and variance 1, scaled and shifted."""
    return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["bias"]


def new_network(key: Array) -> Parameters:
    """Return the parameters of trunk and heads."""
    keys = iter(jax.random.split(key, 8 + 6 * LAYERS))
    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    blocks = [
        {
            "attention_norm": norm,
            "query": linear(next(keys), WIDTH, WIDTH),
            "key": linear(next(keys), WIDTH, WIDTH, bias=False),
            "value": linear(next(keys), WIDTH, WIDTH),
            "out": linear(next(keys), WIDTH, WIDTH),
            "feedforward_norm": norm,
            "wide": linear(next(keys), WIDTH, 4 * WIDTH),
            "narrow": linear(next(keys), 4 * WIDTH, WIDTH),
        }
        for _ in range(LAYERS)
    ]
    actor = [linear(next(keys), WIDTH, HIDDEN), linear(next(keys), HIDDEN, ACTIONS)]
    actor[1] = jax.tree.map(lambda x: 0.01 * x, actor[1])  # the first policy is near uniform
    return {
        "cells": linear(next(keys), PLANES, CELL, bias=False),
        "project": linear(next(keys), PATCH * PATCH * CELL, WIDTH),
        "positions": jax.random.normal(next(keys), (ROWS, WIDTH)) * 0.5**0.5,
        "blocks": blocks,
        "norm": norm,
        "actor": actor,
        "critic": [linear(next(keys), WIDTH, HIDDEN), linear(next(keys), HIDDEN, 1)],
    }


def block(layers: Parameters, x: Array, only: Array | None) -> Array:
    """Return a block's rows ``(N, rows, WIDTH)``, or of each board the one row ``only``."""
    asked = asking = normal(layers["attention_norm"], x)
    if only is not None:
        x, asking = (jnp.take_along_axis(y, only[:, None, None], 1) for y in (x, asking))
    query, key, value = (
        apply(layers[name], y).reshape(*y.shape[:2], HEADS, -1)
        for name, y in (("query", asking), ("key", asked), ("value", asked))
    )
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) * (WIDTH // HEADS) ** -0.5
    read = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)
    x = x + apply(layers["out"], read.reshape(x.shape))
    wide = jax.nn.gelu(apply(layers["wide"], normal(layers["feedforward_norm"], x)), False)
    return x + apply(layers["narrow"], wide)


def network(parameters: Parameters, boards: Array) -> tuple[Array, Array]:
    """Return logits ``(N, 4)`` and values ``(N,)`` of boards ``(N, SIZE, SIZE, PLANES)``."""
    number, side = len(boards), SIZE // PATCH
    patches = boards.reshape(number, side, PATCH, side, PATCH, PLANES).swapaxes(2, 3)
    patches = patches.reshape(number, ROWS, PATCH * PATCH, PLANES)
    head = patches[..., HEAD_PLANE].any(-1).argmax(-1)
    cells = apply(parameters["cells"], patches).reshape(number, ROWS, -1)
    x = apply(parameters["project"], cells) + parameters["positions"]
    *blocks, last = parameters["blocks"]
    for layers in blocks:
        x = block(layers, x, None)
    x = normal(parameters["norm"], block(last, x, head))[:, 0]
    logits, value = (
        apply(layers[1], jax.nn.gelu(apply(layers[0], x), False))
        for layers in (parameters["actor"], parameters["critic"])
    )
    return logits, value[:, 0]


# -------------------------------------------------------------------------------- the training


class Step(NamedTuple):
    """What is kept of a step of all games, each of shape ``(GAMES, ...)``."""

    board: Array
    action: Array
    log_prob: Array
    value: Array
    reward: Array
    done: Array
    score: Array  # apples so far in the game


class Training(NamedTuple):
    """What goes from one rollout to the next."""

    parameters: Parameters
    optimizer: Any
    games: Any
    observation: Any
    score: Array
    key: Array


def make(rollouts: int) -> tuple[Training, Callable, Callable]:
    """Return the beginning of a run, and what makes a rollout of it, and a rollout's updates."""
    env = VmapAutoResetWrapper(Snake(num_rows=SIZE, num_cols=SIZE, time_limit=500))
    updates = EPOCHS * MINIBATCHES
    optimizer = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.adam(lambda count: RATE * (1 - (count // updates) / rollouts)),
    )
    key, *keys = jax.random.split(jax.random.PRNGKey(0), 3)
    parameters = new_network(keys[0])
    games, first = jax.jit(env.reset)(jax.random.split(keys[1], GAMES))
    begin = Training(
        parameters, optimizer.init(parameters), games, first.observation, jnp.zeros(GAMES), key
    )

    def play(now: Training, _: None) -> tuple[Training, Step]:
        key, draw = jax.random.split(now.key)
        logits, value = network(now.parameters, now.observation.grid)
        action = jax.random.categorical(draw, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        died = ~jnp.take_along_axis(now.observation.action_mask, action[:, None], 1)[:, 0]
        games, after = env.step(now.games, action)
        ate, done = after.reward > 0, after.last()
        reward = jnp.where(died, DEATH, jnp.where(ate, FOOD, STEP))
        score = now.score + ate
        step = Step(now.observation.grid, action, log_prob, value, reward, done, score)
        score = jnp.where(done, 0.0, score)
        return now._replace(games=games, observation=after.observation, score=score, key=key), step

    def collect(now: Training) -> tuple[Training, tuple[Step, Array, Array]]:
        """Return a rollout ``(STEPS // GAMES, GAMES)`` with its advantages and value targets."""
        now, steps = lax.scan(play, now, None, STEPS // GAMES)
        _, last = network(now.parameters, now.observation.grid)

        def backwards(later: tuple[Array, Array], step: Step) -> tuple[tuple[Array, Array], Array]:
            next_value, advantage = later
            goes_on = 1.0 - step.done
            error = step.reward + GAMMA * goes_on * next_value - step.value
            advantage = error + GAMMA * LMBDA * goes_on * advantage
            return (step.value, advantage), advantage

        _, advantage = lax.scan(backwards, (last, jnp.zeros_like(last)), steps, reverse=True)
        return now, (steps, advantage, advantage + steps.value)

    def loss(parameters: Parameters, batch: tuple[Step, Array, Array]) -> Array:
        step, advantage, target = batch
        logits, value = network(parameters, step.board)
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, step.action[:, None], 1)[:, 0]
        ratio = jnp.exp(log_prob - step.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-6)
        gain = jnp.minimum(ratio * advantage, ratio.clip(1 - CLIP, 1 + CLIP) * advantage)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        error = optax.huber_loss(value, target)
        return -gain.mean() + VALUE * error.mean() - ENTROPY * entropy.mean()

    def learn(now: Training, rollout: tuple[Step, Array, Array]) -> Training:
        """Return the training after all updates of a rollout."""
        key, *keys = jax.random.split(now.key, 1 + EPOCHS)
        flat = jax.tree.map(lambda x: x.reshape(STEPS, *x.shape[2:]), rollout)
        order = jnp.concatenate([jax.random.permutation(key, STEPS) for key in keys])

        def update(carry: tuple[Parameters, Any], rows: Array) -> tuple[tuple, None]:
            parameters, state = carry
            batch = jax.tree.map(lambda x: x[rows], flat)
            gradients = jax.grad(loss)(parameters, batch)
            changes, state = optimizer.update(gradients, state)
            return (optax.apply_updates(parameters, changes), state), None

        order = order.reshape(updates, STEPS // MINIBATCHES)
        carry, _ = lax.scan(update, (now.parameters, now.optimizer), order)
        return now._replace(parameters=carry[0], optimizer=carry[1], key=key)

    return begin, collect, learn


def train(rollouts: int) -> tuple[list[tuple[int, float, float]], list[float]]:
    """Train, and return of each rollout frames and clocks at its end, and the mean score."""
    now, collect, learn = make(rollouts)

    @jax.jit
    def both(now: Training) -> tuple[Training, Array]:
        now, rollout = collect(now)
        step = rollout[0]
        score = jnp.where(step.done, step.score, 0.0).sum() / jnp.maximum(step.done.sum(), 1)
        return learn(now, rollout), score

    marks, scores = [], []
    for number in range(1, rollouts + 1):
        now, score = jax.block_until_ready(both(now))
        marks.append((number * STEPS, time.perf_counter(), time.process_time()))
        scores.append(float(score))
    return marks, scores


def measure(rollouts: int) -> None:
    """Write frames and seconds from the end of the first rollout, which compiles, to the last."""
    marks, _ = train(rollouts)
    frames, wall, cpu = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    print(json.dumps({"frames": frames, "wall": wall, "cpu": cpu}))


def show_scores(frames: int) -> None:
    """Train, and print the mean score of the games that ended in a rollout, every fifth one."""
    marks, scores = train(-(-frames // STEPS))
    for (seen, *_), score in list(zip(marks, scores, strict=True))[::5]:
        print(f"{seen:8} frames {score:6.2f}")


def show_parts(repeats: int) -> None:
    """Print what a rollout and its updates take, each jitted by itself, medians in ms."""
    now, *parts = make(repeats)
    collect, learn = map(jax.jit, parts)
    took: dict[str, list[float]] = {"collect, GAE": [], "updates": []}
    for _ in range(1 + repeats):
        times = [time.process_time()]
        now, rollout = jax.block_until_ready(collect(now))
        times.append(time.process_time())
        now = jax.block_until_ready(learn(now, rollout))
        times.append(time.process_time())
        for name, before, after in zip(took, times[:-1], times[1:], strict=True):
            took[name].append(1e3 * (after - before))
    for name, spans in took.items():
        print(f"{name:14} {median(spans[1:]):8.1f} ms of the processor a rollout")


if __name__ == "__main__":
    {"measure": measure, "learn": show_scores, "parts": show_parts}[sys.argv[1]](int(sys.argv[2]))
