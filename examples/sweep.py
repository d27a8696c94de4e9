"""Train several dictionaries on one stream of activations: the language model runs once for all of them.

python examples/sweep.py
"""

import temposae as ts


def main(tokens: int = 300_000, sparsities: tuple[int, ...] = (4, 8, 16, 32)) -> dict[str, ts.Run]:
    stream_config = ts.StreamConfig(model="testbed")
    stream = ts.ActivationStream(stream_config, tokens=tokens)
    runs = {
        f"k{k}": ts.RunConfig(
            stream=stream_config,
            sae=ts.SAEConfig(d_in=stream.d_in, d_sae=512, k=k),
            train=ts.TrainConfig(tokens=tokens, control=False),
        )
        for k in sparsities
    }
    trained = ts.train_together(stream, runs)
    print(f"{'':>6} {'L0':>6} {'FVU':>8} {'dead':>6}")
    for name, run in trained.items():
        last = run.metrics[-1]
        print(f"{name:>6} {last['l0']:6.1f} {last['fvu']:8.4f} {last['dead_fraction']:6.1%}")
    return trained


if __name__ == "__main__":
    main()
