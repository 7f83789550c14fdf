// Inputs, poisoned outputs and the comparison with float64.
#pragma once
#include "ptx_emulated.hpp"

inline std::mt19937_64 rng{20};
inline double uniform_between(double low, double high) { return low + (high - low) * double(rng() >> 11) / double(1ull << 53); }
inline int integer_between(int low, int high) { return low + int(rng() % uint64_t(high - low + 1)); }

// Ends where a page that may not be touched begins: reading or writing past the end ends the test.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t n) : n_(n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = (n * sizeof(T) + 15) / 16 * 16;
    size_ = (bytes + page - 1) / page * page + page;
    base_ = (char*)mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) std::abort();
    std::memset(base_, 0xff, size_ - page);  // NaN in every float format
    data_ = (T*)(base_ + size_ - page - bytes);
  }
  ~Buffer() { munmap(base_, size_); }
  Buffer(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t n_, size_;
  char* base_;
  T* data_;
};

inline void fill(Buffer<bf16>& b, double scale = 1) {
  for (size_t i = 0; i < b.size(); i++) b[i] = bf16(bf16_bits(float(uniform_between(-scale, scale))));
}
inline double value(bf16 v) { return bf16_value(v); }

inline int failures = 0;
inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED: %s\n", what.c_str());
}
// Normalised mean square error; NaN (an output nobody wrote) fails.
struct Nmse {
  double error = 0, signal = 0;
  void add(double got, double want) { error += (got - want) * (got - want), signal += want * want; }
  void below(double bound, const std::string& what) const {
    const double nmse = error / std::max(signal, 1e-30);
    if (!(nmse <= bound)) std::printf("%s: NMSE %g\n", what.c_str(), nmse);
    expect(nmse <= bound, what);
  }
};
// Rounding the result to bf16 alone gives about 1.4e-6; a product of rounded probabilities a little more.
constexpr double BF16_BOUND = 1e-5;

#include "prelude.cuh"  // of the kernels
