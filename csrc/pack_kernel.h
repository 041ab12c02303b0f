// Packing of weights and plain products out = a B. Included once per instruction set (see simd.h).

template <class T>
void pack_blocks(const Pack& p, int64_t begin, int64_t end) {
  using P = Panel<T>;
  const int64_t first = begin * kColumns, last = end * kColumns < p.columns ? end * kColumns : p.columns;
  pack_b<P, T>(static_cast<const T*>(p.source) + first * p.stride_n, p.stride_k, p.stride_n, p.depth, last - first,
               static_cast<P*>(p.out) + begin * block_stride<P>(p.depth));
}

template <class T>
int64_t pack_elements(int64_t depth, int64_t columns) {
  return packed_elements<Panel<T>>(depth, columns);
}

constexpr int64_t kProductBlocks = 4;  // column blocks of a C buffer

// Bytes of a task's panel of A, rounded up to a cache line, and its C buffer.
template <class T>
int64_t product_panel_bytes(const Product& p) {
  return (p.tile_rows * padded<Panel<T>>(p.depth) * int64_t(sizeof(Panel<T>)) + 63) / 64 * 64;
}
template <class T>
int64_t product_scratch(const Product& p) {
  return product_panel_bytes<T>(p) + p.tile_rows * kProductBlocks * kColumns * 4;
}

template <class T>
void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* panel = static_cast<P*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + product_panel_bytes<T>(p));
  const int64_t blocks = blocks_of(p.columns), ldc = kProductBlocks * kColumns;
  const bool in_place = sizeof(P) == sizeof(T) && p.stride_k == 1 && p.depth % kDepth<P> == 0;
  const T* a = static_cast<const T*>(p.a);
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * p.tile_rows, rows = p.rows - first < p.tile_rows ? p.rows - first : p.tile_rows;
    const P* rows_of_a = panel;
    int64_t lda = padded<P>(p.depth);
    if (in_place) rows_of_a = reinterpret_cast<const P*>(a + first * p.stride_m), lda = p.stride_m;
    else pack_a<P, T>(a + first * p.stride_m, p.stride_m, p.stride_k, rows, p.depth, panel, lda);
    T* out = static_cast<T*>(p.out) + first * p.columns;
    for (int64_t j = 0; j < blocks; j += kProductBlocks) {
      const int64_t some = blocks - j < kProductBlocks ? blocks - j : kProductBlocks;
      gemm<P>(rows, some, p.depth, rows_of_a, lda, static_cast<const P*>(p.b) + j * block_stride<P>(p.depth), c, ldc, false);
      const int64_t n0 = j * kColumns, wide_n = p.columns - n0 < some * kColumns ? p.columns - n0 : some * kColumns;
      for (int64_t m = 0; m < rows; ++m) {
        int64_t n = 0;
        for (; n + kLanes <= wide_n; n += kLanes) store<kLanes>(out + m * p.columns + n0 + n, load<kLanes>(c + m * ldc + n));
        for (; n < wide_n; ++n) store<1>(out + m * p.columns + n0 + n, load<1>(c + m * ldc + n));
      }
    }
  }
  tiles_end();
}

constexpr PackTable pack_table() {
  return {sizeof(Panel<bf16>) == 2, pack_elements<float>,   pack_elements<bf16>, kColumns,       pack_blocks<float>,
          pack_blocks<bf16>,        product_scratch<float>, product_scratch<bf16>, product<float>, product<bf16>};
}
