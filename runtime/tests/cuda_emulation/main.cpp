// c++ -std=c++20 -O2 -I. -I../../src/cuda/kernels main.cpp && ./a.out [rows|attention|gemv|fused|sample|wide|chain]


#include "check.hpp"

#include "attention_test.hpp"
#include "chain_linear_test.hpp"
#include "fused_linear_test.hpp"
#include "gemv_test.hpp"
#include "rows_test.hpp"
#include "sample_test.hpp"
#include "wide_linear_test.hpp"

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto part = [&](const char* name, void (*test)()) {
    if (only.empty() || only == name) test(), std::printf("%s: %s\n", name, failures ? "FAILED" : "ok"), std::fflush(stdout);
  };
  part("rows", test_rows);
  part("attention", test_attention);
  part("gemv", test_gemv);
  part("fused", test_fused_linear);
  part("sample", test_sample);
  part("wide", test_wide_linear);
  part("chain", test_chain_linear);
  return failures ? 1 : 0;
}
