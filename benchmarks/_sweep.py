import sys, os, torch
from vllm.model_executor.layers.steering_kernels import stages_cuda as C
from vllm.model_executor.layers.steering_kernels.run import Run
sys.path.insert(0, "benchmarks")
from bench_kernels import *
assert kernel.extension_is_built()
b = Bench(); print(b.bandwidth, b.flops)
quick = len(sys.argv) > 1
def trace(name):
    if not hasattr(torch.ops.vllm_steering, "trace"): return
    t = torch.zeros(132, 8, dtype=torch.int64, device=DEVICE)
    torch.ops.vllm_steering.trace(t); torch.cuda.synchronize()
    t = t.cpu(); t = t[t[:, 0] > 0]; z = t[:, 0].min()
    print(" trace", name, [(round((t[:, k].min() - z).item() / 1e3, 1), round((t[:, k].double().median() - z).item() / 1e3, 1), round((t[:, k].max() - z).item() / 1e3, 1)) for k in range(7)], flush=True)
def stages(slot, tokens):
    w = slot.weights; D = w.d_model
    step = StepState(tokens, DEVICE); step.index[2] = 1
    ws = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    s = Stream(tokens, D); h, r = s.now[0], s.now[1]
    bf = ws.buffers(slot, tokens, False)
    run = Run(slot, step, ws, bf, h, r, Tier.FULL, False, -1)
    t = {}
    C.compact(run, 0)
    t["compact"] = b.timer(lambda: C.compact(run, 0), s.restore, 10)
    t["encode"] = b.timer(lambda: C.encode(run, 0), ws.nnz.zero_, b.floor(w.W_enc.shape[0], D, tokens))
    trace(f"encode {tokens}")
    ws.nnz.zero_(); C.encode(run, 0)
    t["decode"] = b.timer(lambda: C.decode(run, 0), s.restore, 20)
    print(tuple(w.W_enc.shape), tokens, {k: round(v, 1) for k, v in t.items()}, "floor", round(b.floor(w.W_enc.shape[0], D, tokens), 1), flush=True)
for shape, toks in (((16384, 2304), (1, 64, 256, 512, 2048)), ((65536, 3584), (256,))):
    if quick and shape[0] > 20000: continue
    slot = make_slot(*shape, Activation.JUMPRELU)
    for tokens in toks:
        if quick and tokens not in (1, 256): continue
        stages(slot, tokens)
        b.full("jumprelu", slot, tokens)
        trace(f"full {tokens}")
    if shape[0] < 20000:
        b.full("idle", slot, 256, active=0)
        b.full("five", slot, 256, active=5)
        trace("five of 256")
        b.full("five", slot, 5)
    del slot; torch.cuda.empty_cache()
if not quick:
    slot = make_slot(16384, 2304, Activation.TOPK)
    for t in (1, 256, 2048): b.full("topk", slot, t, l0=K)
