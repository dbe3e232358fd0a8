// Runs an AOTInductor package without Python: runner PACKAGE OUTPUT (INPUT DTYPE SIZES)...
// Inputs and the first output are raw files, DTYPE is float, long or bool, SIZES are as in 1x200x32.
#include <ATen/ops/from_file.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  const std::map<std::string, at::ScalarType> dtypes = {{"float", at::kFloat}, {"long", at::kLong}, {"bool", at::kBool}};
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<at::Tensor> inputs;
  for (int i = 3; i + 2 < argc; i += 3) {
    std::vector<int64_t> sizes;
    int64_t count = 1;
    std::stringstream given(argv[i + 2]);
    for (std::string size; std::getline(given, size, 'x');) {
      sizes.push_back(std::stoll(size));
      count *= sizes.back();
    }
    inputs.push_back(at::from_file(argv[i], false, count, dtypes.at(argv[i + 1])).view(sizes));
  }
  const at::Tensor result = loader.run(inputs)[0].contiguous();
  at::from_file(argv[2], true, result.numel(), at::kFloat).copy_(result.flatten());
  std::cout << result.sizes() << std::endl;
}
