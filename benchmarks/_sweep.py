import sys, torch
sys.path.insert(0, "benchmarks")
from bench_kernels import *
from vllm.model_executor.layers.steering_kernels.plan import EncodePlan
b = Bench(); print(b.bandwidth, b.flops)
slot = make_slot(16384, 2304, Activation.JUMPRELU)
def stages(tokens):
    w = slot.weights
    step = StepState(tokens, DEVICE); step.index[2] = 1
    ws = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    s = Stream(tokens, 2304); h, r = s.now[0], s.now[1]
    bf = ws.buffers(slot, tokens, False); idx = step.index[2]
    kernel.full_reconstruction(slot, step, ws, h, r)
    s.restore()
    kernel._compact(slot, step, idx, slot.full, ws, bf, h, r, 0, -1)
    def enc():
        kernel._encode(slot, ws, bf, 0, False)
    def zero():
        ws.nnz.zero_()
    t = {}
    t["compact"] = b.timer(lambda: kernel._compact(slot, step, idx, slot.full, ws, bf, h, r, 0, -1), s.restore, 10)
    t["encode"] = b.timer(enc, zero, 50)
    zero(); enc()
    t["resolve"] = b.timer(lambda: kernel._coefficients(slot, idx, slot.full, ws, bf, 0, False), lambda: None, 10)
    t["combine"] = b.timer(lambda: kernel._combine(slot, idx, slot.full, ws, bf, h, r, 0, Tier.FULL, False), s.restore, 10)
    print(tokens, {k: round(v, 1) for k, v in t.items()}, flush=True)
    return enc, zero
for tokens in (1, 64, 256, 2048):
    stages(tokens)
P = EncodePlan
cands = {
 1: [P(64,128,(16,),4,5,3), P(64,256,(16,),4,3,2), P(64,64,(16,),4,6,4), P(128,128,(16,),4,4,1), P(64,128,(16,),4,3,4)],
 64: [P(64,64,(16,64),4,5,3), P(128,64,(16,64),4,4,2), P(64,128,(16,64),4,3,3), P(128,128,(16,64),8,4,1)],
 256: [P(128,64,(16,64,256),8,3,1), P(128,64,(16,64,128),4,3,2), P(64,64,(16,64,256),4,3,2), P(64,128,(16,64,256),8,2,1)],
 2048: [P(128,64,(16,64,256),8,3,1), P(128,64,(16,64,128),4,3,2), P(256,64,(16,64,128),8,4,1)],
}
for tokens, ps in cands.items():
    for p in ps:
        kernel.plan_encode = lambda t, i, p=p: p
        try:
            w = slot.weights
            step = StepState(tokens, DEVICE); step.index[2] = 1
            ws = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
            s = Stream(tokens, 2304)
            bf = ws.buffers(slot, tokens, False)
            kernel._compact(slot, step, step.index[2], slot.full, ws, bf, s.now[0], s.now[1], 0, -1)
            print(tokens, p, round(b.timer(lambda: kernel._encode(slot, ws, bf, 0, False), ws.nnz.zero_, 50), 1), flush=True)
        except Exception as e:
            print(tokens, p, repr(e)[:200], flush=True)
