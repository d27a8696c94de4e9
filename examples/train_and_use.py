"""Train a dictionary on a language model's activations, and use it inside the model.

python examples/train_and_use.py
"""

import temposae as ts
import torch


def main(tokens: int = 500_000) -> dict[str, float]:
    # Activations of the small language model that ships with the package. `model` also takes a hub name or a folder.
    stream = ts.ActivationStream(ts.StreamConfig(model="testbed"), tokens=tokens)
    run = ts.train(stream, ts.SAEConfig(d_in=stream.d_in, d_sae=1024, k=16), ts.TrainConfig(tokens=tokens))
    print(run)

    # x [N, D] with the position pos [N] and the token of each activation
    batch = stream.next(1024)
    code = run.sae.encode_sparse(batch.x.float(), batch.pos)  # N x K values and latent indices
    x_hat = run.sae.decode(code)
    fvu = ((batch.x - x_hat).square().sum() / (batch.x - batch.x.float().mean(0)).square().sum()).item()
    print(f"FVU on a batch: {fvu:.4f}")

    # Ablate the latent that is active most often, and see what that costs the language model.
    latent = code.indices[code.values > 0].bincount(minlength=1024).argmax()
    model, hook = stream.model.bridge, stream.model.hook
    rows = next(iter(stream.held_out(rows=32)))
    is_text = torch.arange(rows.tokens.shape[1] - 1) < rows.length[:, None] - 1  # not padding
    losses = {}
    edits = {"model": None, "dictionary": lambda f: f, "without the latent": lambda f: f.index_fill(-1, latent, 0)}
    for name, edit in edits.items():
        hooks = [] if edit is None else run.sae.fwd_hooks(hook, edit=edit)
        with model.hooks(fwd_hooks=hooks):
            losses[name] = model(rows.tokens, return_type="loss", loss_per_token=True)[is_text].mean().item()
    print({name: round(loss, 4) for name, loss in losses.items()})
    return {"fvu": fvu, **losses}


if __name__ == "__main__":
    main()
