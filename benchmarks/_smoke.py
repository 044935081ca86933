import sys; sys.path.insert(0,"tests/kernels/steering"); sys.path.insert(0,"benchmarks")
import torch
from steering_reference import *
from vllm.model_executor.layers import sae_full_reconstruction_kernel as K
print("built", K.extension_is_built())
for F, D, T in ((256, 64, 1), (4096, 768, 5), (4096, 768, 300), (16384, 2304, 40)):
    slot = make_slot(F, D, l0=60); set_row(slot.full, 1, []); set_row(slot.full, 2, random_clamps(F, 4))
    step = make_step(T, T, [1, 2] if T > 1 else [1], Tier.FULL)
    ws = K.SteeringWorkspace(T, [slot], DEVICE)
    before = make_stream(T, D, DTYPE)
    h, r = before[0].clone(), before[1].clone()
    run = K._Run(slot, step, ws, ws.buffers(slot, T, False), h, r, Tier.FULL, False, -1)
    K._compact_cuda(run, 0); torch.cuda.synchronize()
    x = before[0] + before[1]
    print(F, D, T, "count", int(ws.count), "x", float((run.buffers.x - x).abs().max()), flush=True)
    K._encode_cuda(run, 0); torch.cuda.synchronize()
    f = activations(slot, x); want = (f != 0).sum(1)
    got = ws.nnz[:T]; print("nnz", got[:6].tolist(), want[:6].tolist(), bool((got == want).all()), flush=True)
    for t in (0, T - 1):
        e = run.buffers.entries[t, : int(got[t])]
        v = (e & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
        print(" err", float((f[t][(e >> 32).clamp(0, F - 1)] - v).abs().max()) if len(e) else None)
    K._decode_cuda(run, 0); torch.cuda.synchronize()
    try:
        check(expected(slot, Tier.FULL, step, *before), before, (h, r)); print("ok", flush=True)
    except AssertionError as e: print("BAD", str(e)[:200], flush=True)
