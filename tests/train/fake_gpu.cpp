// A CUDA device for FakeTensorMode on a CPU build of torch: without a device guard and hooks, autograd refuses "cuda".
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

namespace {
struct CUDAHooks : at::CUDAHooksInterface { // torch looks for a class of this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
};
} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
