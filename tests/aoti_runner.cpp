// Runs an AOTInductor package without Python: runner PACKAGE OUTPUT (INPUT LENGTH DIM)...
// Inputs and output are raw float32 files; the inputs are (1, LENGTH, DIM).
#include <ATen/ops/from_file.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<at::Tensor> inputs;
  for (int i = 3; i + 2 < argc; i += 3) {
    const int64_t length = std::atoll(argv[i + 1]), dim = std::atoll(argv[i + 2]);
    inputs.push_back(at::from_file(argv[i], false, length * dim, at::kFloat).view({1, length, dim}));
  }
  const at::Tensor result = loader.run(inputs)[0].contiguous();
  at::from_file(argv[2], true, result.numel(), at::kFloat).copy_(result.flatten());
  std::cout << result.sizes() << std::endl;
}
