import sys, torch
sys.path.insert(0, "benchmarks")
from bench_kernels import *
assert kernel.extension_is_built()
b = Bench(); print(b.bandwidth, b.flops)
def stages(slot, tokens, cuda):
    w = slot.weights; D = w.d_model
    step = StepState(tokens, DEVICE); step.index[2] = 1
    ws = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    s = Stream(tokens, D); h, r = s.now[0], s.now[1]
    bf = ws.buffers(slot, tokens, False)
    run = kernel._Run(slot, step, ws, bf, h, r, Tier.FULL, False, -1)
    C = (kernel._compact_cuda if cuda else kernel._compact)
    E = (kernel._encode_cuda if cuda else kernel._encode)
    t = {}
    C(run, 0)
    t["compact"] = b.timer(lambda: C(run, 0), s.restore, 10)
    t["encode"] = b.timer(lambda: E(run, 0), ws.nnz.zero_, b.floor(w.W_enc.shape[0], D, tokens))
    ws.nnz.zero_(); E(run, 0)
    if cuda:
        for v in (1, 2, 3):
            kernel.decode_vectors = lambda rows, v=v: v
            t[f"decode{v}"] = b.timer(lambda: kernel._decode_cuda(run, 0), s.restore, 20)
    else:
        t["resolve"] = b.timer(lambda: kernel._coefficients(run, 0), lambda: None, 10)
        t["combine"] = b.timer(lambda: kernel._combine(run, 0, False), s.restore, 10)
    print(tuple(w.W_enc.shape), tokens, {k: round(v, 1) for k, v in t.items()}, "floor", round(b.floor(w.W_enc.shape[0], D, tokens), 1), flush=True)
for shape, toks in (((16384, 2304), (1, 8, 32, 64, 256, 1024, 2048, 8192)), ((65536, 3584), (1, 256, 2048))):
    slot = make_slot(*shape, Activation.JUMPRELU)
    for tokens in toks:
        stages(slot, tokens, True)
    del slot; torch.cuda.empty_cache()
from vllm.model_executor.layers.steering_kernels.plan import decode_vectors
kernel.decode_vectors = decode_vectors
b.clamps()
slot = make_slot(16384, 2304, Activation.JUMPRELU)
for t in (1, 64, 256, 2048): b.full("jumprelu", slot, t)
b.full("idle", slot, 256, active=0)
b.full("five", slot, 256, active=5)
b.full("five", slot, 5)
slot = make_slot(16384, 2304, Activation.TOPK)
for t in (1, 64, 256, 2048): b.full("topk", slot, t, l0=K)
